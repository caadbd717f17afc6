"""The comparison with other libraries behind `fastmeta bench`.

Source: docs/architecture.md, "Benchmarks".
"""

from fastmeta.benchmark.chart import write_chart
from fastmeta.benchmark.engine import run
from fastmeta.benchmark.peers import PEERS
from fastmeta.benchmark.rows import Row, write_csv
from fastmeta.benchmark.timing import QUICK, Protocol

__all__ = ["PEERS", "QUICK", "Protocol", "Row", "run", "write_chart", "write_csv"]
