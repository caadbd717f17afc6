"""Parameters by name patterns: what `adapt=` and the keys of a dict of learning rates may say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase


def matching(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names that are `pattern`, or else match it as a glob: `*`, which dots do not stop, `?`,
    `[abc]`, `[!abc]`."""
    names = tuple(names)
    return (pattern,) if pattern in names else tuple(name for name in names if fnmatchcase(name, pattern))


def keys_by_name(
    what: str, given: Mapping[str, object], names: tuple[str, ...], unused: tuple[str, ...] = ()
) -> dict[str, str]:
    """name -> the key of `given` that it comes under: the name itself, or else the first pattern
    that matches it; of `unused` those that come under one.

    Args:
        what: the argument, for messages.
        given: its entries, by name or pattern.
        names: those that must have an entry.
        unused: those that may have one, which nothing comes of.

    Raises:
        ValueError: a name without a key, or a key without a name.
    """
    keys: dict[str, str] = {name: name for name in (*names, *unused) if name in given}
    for key in given:
        found = matching(key, names) if isinstance(key, str) else ()
        of_unused = matching(key, unused) if isinstance(key, str) else ()
        if of_unused:
            for name in (*found, *of_unused):
                keys.setdefault(name, key)
            continue
        if not found:
            raise ValueError(
                f"{what} has a rate for {key!r}, which is not adapted; adapted: {', '.join(names)}"
            )
        free = [name for name in found if keys.setdefault(name, key) == key]
        if not free:
            raise ValueError(f"{what} has a rate for {key!r}, but keys before it name all that it matches")
    missing = [name for name in names if name not in keys]
    if missing:
        raise ValueError(f"{what} must have a rate for every adapted parameter, none for {missing[0]!r}")
    return keys
