"""The peers of the benchmark, one small file each. To add one, add its file and its entry here."""

from __future__ import annotations

from fastmeta.backends import NAMES
from fastmeta.benchmark.peers.autograd_loop import AutogradLoop
from fastmeta.benchmark.peers.higher_loop import Higher
from fastmeta.benchmark.peers.jax_peers import JaxLoop, JaxVmap
from fastmeta.benchmark.peers.ours import MAMLPeer, MetaGradientPeer, NoOpAutograd
from fastmeta.benchmark.peers.peer import Peer, Prepared
from fastmeta.benchmark.peers.torch_func import TorchCompile, TorchFunc
from fastmeta.benchmark.peers.torchopt_loop import TorchOpt

__all__ = ["NOOP", "OURS", "PEERS", "Peer", "Prepared"]

#: The peer that all others are measured against: fastmeta on the backend that "auto" takes.
OURS = "fastmeta"

#: The peer whose time is subtracted from that of an autograd Function.
NOOP = "noop-autograd"

_ALL: tuple[Peer, ...] = (
    MetaGradientPeer(OURS, "auto"),
    MAMLPeer("fastmeta-maml", "auto"),
    *(MetaGradientPeer(f"fastmeta-{name}", name) for name in ("cpu", "machine", "torch") if name in NAMES),
    NoOpAutograd(),
    JaxVmap(),
    JaxLoop(),
    TorchCompile(),
    TorchFunc(),
    AutogradLoop(),
    Higher(),
    TorchOpt(),
)
PEERS = {peer.name: peer for peer in _ALL}
