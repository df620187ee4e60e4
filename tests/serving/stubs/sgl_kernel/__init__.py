"""A stand-in for sgl_kernel, which has no CPU wheel: what SGLang's CPU path takes from it.

Without its operators SGLang takes the processor for one without AMX and computes with torch.
"""

from typing import Any, NoReturn

__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(
    requests: Any, table: Any, starts: Any, stops: Any, locations: Any, pool_len: int
) -> None:
    """Row of `table` for each request: columns [start, stop) become its next `locations`."""
    used = 0
    for request, start, stop in zip(
        requests.tolist(), starts.tolist(), stops.tolist(), strict=True
    ):
        table[request, start:stop] = locations[used : used + stop - start]
        used += stop - start


def __getattr__(name: str) -> Any:
    """Any other function: it may be imported, not called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"the stand-in for sgl_kernel has no {name}")

    return missing
