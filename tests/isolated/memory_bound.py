"""Fresh processes: resident memory, mapped file pages included, stays within result and one expert.

Fresh, because memory freed earlier in a process is used again and does not count as growth.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES: dict[str, Any] = {"n_hidden": 512, "n_inter": 1024, "n_expert": 72}
ONE_EXPERT = 3 * 512 * 1024 * 2
SLACK = 4 << 20  # imports, headers, page tables
LAYOUTS = ["gate_up_down", "fused", "gpt_oss"]


def measure(folder: str, layout: str) -> int:
    import moepad
    import tqdm  # noqa: F401
    from checkpoints import PREFIX
    from memory import growth

    plan = moepad.plan(**SIZES, bias=layout == "gpt_oss", tp_size=2, align=256)
    experts, loaded = growth(lambda: moepad.load_experts(folder, PREFIX, plan, progress=False))
    _, updated = growth(lambda: experts.update(folder, progress=False))
    print(f"{layout}: {plan.nbytes} bytes; load {loaded}, update {updated}")
    is_right = plan.nbytes < loaded < plan.nbytes + ONE_EXPERT + SLACK
    return 0 if is_right and updated < ONE_EXPERT + SLACK else 1


def main() -> int:
    if len(sys.argv) == 3:
        return measure(*sys.argv[1:])
    from checkpoints import make_checkpoint, write_folder

    codes = []
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as at:
            sizes = {**SIZES, "bias": layout == "gpt_oss"}
            folder = write_folder(Path(at) / "c", make_checkpoint(layout, **sizes), 2)
            codes.append(subprocess.run([sys.executable, __file__, folder, layout]).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
