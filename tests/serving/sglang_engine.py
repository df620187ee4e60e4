"""SGLang's complete engine on a CPU, and transformers, on the same prompts: tokens and logprobs.

A server of one process, so that its imports are paid for once: `python sglang_engine.py` reads jobs
from standard input, a JSON object a line:

    checkpoint, reference   folders; transformers runs the second, in float32 where they differ
    dtype, tp               of the engine
    update                  null, or a folder: the engine answers, takes its weights, answers again
    options                 more arguments of the engine
    environment             variables of the engine's processes

and prints a line for each, ANSWERS and a JSON object: for both, the answers to each prompt, one
round after the other.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

ANSWERS = "answers: "
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5]]
N_TOKEN = 8


def of_transformers(path: str, dtype: str) -> list[dict[str, Any]]:
    """Greedy tokens and their log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    answers = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        with torch.no_grad():
            for _ in range(N_TOKEN):
                last = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
                tokens.append(int(last.argmax()))
                logprobs.append(float(last.max()))
        answers.append({"tokens": tokens[len(prompt) :], "logprobs": logprobs})
    return answers


def of_sglang(
    path: str, dtype: str, tp: int, update: str | None, **options: Any
) -> list[dict[str, Any]]:
    import sglang

    engine = sglang.Engine(
        model_path=path,
        dtype=dtype,
        tp_size=tp,
        device="cpu",
        skip_tokenizer_init=True,
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_radix_cache=True,
        disable_custom_all_reduce=True,
        mem_fraction_static=0.1,
        max_total_tokens=2048,
        max_running_requests=4,
        log_level="error",
        random_seed=0,
        **options,
    )
    try:
        answers = _answer(engine)
        if update:
            engine.update_weights_from_disk(update)
            answers += _answer(engine)
    finally:
        engine.shutdown()
    return answers


def _answer(engine: Any) -> list[dict[str, Any]]:
    results = engine.generate(
        input_ids=PROMPTS,
        sampling_params={"temperature": 0, "max_new_tokens": N_TOKEN, "ignore_eos": True},
        return_logprob=True,
    )
    return [
        {
            "tokens": list(result["output_ids"]),
            "logprobs": [row[0] for row in result["meta_info"]["output_token_logprobs"]],
        }
        for result in results
    ]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(job["environment"])
    is_same = job["checkpoint"] == job["reference"]
    exact = job["dtype"] if is_same else "float32"
    transformers = of_transformers(job["reference"], exact)
    if job["update"]:
        transformers += of_transformers(job["update"], exact)
    sglang = of_sglang(job["checkpoint"], job["dtype"], job["tp"], job["update"], **job["options"])
    return {"sglang": sglang, "transformers": transformers}


def main() -> None:
    for line in sys.stdin:
        print(f"{ANSWERS}{json.dumps(answer(json.loads(line)))}", flush=True)
    os._exit(0)  # the engine's helpers are gone or going; nothing here is left to close


if __name__ == "__main__":
    main()
