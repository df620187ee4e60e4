"""What the tests of serving frameworks share: environments, stand-ins, tiny models, an engine run.

`make_environment` installs a framework and moepad's wheel into a virtual environment of its own;
`tests/test_sglang.py` and `tests/test_vllm.py` run there and skip anywhere else.
"""

import socket


def free_port() -> int:
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
