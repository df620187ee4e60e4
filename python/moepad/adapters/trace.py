"""Evidence that moepad runs inside a framework: MOEPAD_TRACE's file, and one log line per refusal.

A framework that logs a plugin's failure and goes on alone looks like one that uses it. The file
tells them apart, for tests and users: every process appends a line when the op first runs there,
and one for each layer that stays with the framework.
"""

from __future__ import annotations

import logging
import os

from moepad import _core

__all__ = ["ran", "refused"]

_log = logging.getLogger("moepad")
_ran: set[str] = set()
_refused: set[tuple[str, str, str]] = set()


def ran(
    framework: str,
    layer: object,
    *,
    n_inter: int,
    n_inter_pad: int,
    quant: str = "none",
    device: str = "cpu",
    tp: tuple[int, int] = (0, 1),
) -> None:
    """The op ran for `layer`; the first call of a process and framework is written.

    Parameters
    ----------
    framework : str
    layer : object
        Its name, or whatever tells it apart.
    n_inter, n_inter_pad : int
        Columns of this rank, and what its tensors have room for.
    quant : str
        A kind of `moepad.plan`.
    device : str
        ``"cpu"``, or what the framework calls the GPU.
    tp : tuple of int
        Tensor-parallel rank and number of ranks.
    """
    if framework in _ran:
        return
    _ran.add(framework)
    engine = f"cpu-{_core.cpu_isa()}" if device == "cpu" else device
    _log.info("%s: moepad runs %s (%s, %s)", framework, layer, quant, engine)
    _append(
        f"framework={framework} layer={layer} tp={tp[0]}/{tp[1]} n_inter={n_inter} "
        f"n_inter_pad={n_inter_pad} quant={quant} engine={engine}"
    )


def refused(framework: str, layer: object, reason: str) -> None:
    """`layer` stays with its framework because of `reason`: logged once per reason, traced once."""
    if (framework, str(layer), reason) in _refused:
        return
    if not any(reason == known for name, _, known in _refused if name == framework):
        _log.warning("%s keeps %s and layers like it: %s", framework, layer, reason)
    _refused.add((framework, str(layer), reason))
    _append(f"framework={framework} layer={layer} refused: {reason}")


def _append(text: str) -> None:
    """One write to a file opened for appending, so that lines of many processes stay whole."""
    if path := os.environ.get("MOEPAD_TRACE"):
        line = f"pid={os.getpid()} {text}\n".encode()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
