"""What tests of several processes run on each: ``torchrun … tests/ranks.py WHAT OUT``."""

import faulthandler
import inspect
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from captum.attr import (
    FeatureAblation,
    FeaturePermutation,
    KernelShap,
    LayerGradientShap,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
)

from captum_llm_ext import (
    ActivationPatching,
    FeatureInclusion,
    GenerationAttribution,
    GenerationGradientAttribution,
    HierarchicalAblation,
    ModelBaselines,
    PartitionShap,
    Smile,
    TextSegmentInput,
    _compat,
    attribute_dataset,
)
from captum_llm_ext.base.digest import digest
from captum_llm_ext.cli import main
from captum_llm_ext.coalitions import Solution
from captum_llm_ext.model.processes import group as processes
from captum_llm_ext.model.processes import store

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
# Name: method, features, arguments of ``attribute``.
CASES = {
    "FeatureAblation": (FeatureAblation, "token", {}),
    "FeatureInclusion": (FeatureInclusion, "word", {}),
    "exact": (ShapleyValues, [(0, 14), (14, 28), (28, 45), (45, 76)], {"output_unit": None}),
    "ShapleyValueSampling": (ShapleyValueSampling, "word", {"n_samples": 8, "num_trials": 2}),
    "KernelShap": (KernelShap, "word", {"n_samples": 90}),
    "Lime": (Lime, "word", {"n_samples": 90}),
    "nested orders": (PartitionShap, ("sentence", "word"), {"n_samples": 90}),
    "splits": (
        lambda model: PartitionShap(model, scheme="splits"),
        ("sentence", "word"),
        {"n_samples": 40, "output_unit": None},
    ),
    "HierarchicalAblation": (HierarchicalAblation, ("sentence", "word"), {}),
    "rounds": (KernelShap, "word", {"n_samples": 60, "tol": 0.02, "max_evaluations": 200}),
    "contrast": (ShapleyValueSampling, "word", {"n_samples": 4, "attr_target": "contrast"}),
    "surrogate": (KernelShap, "word", {"n_samples": 90, "surrogate": "bf16"}),
    "of captum": (FeaturePermutation, "word", {"output_unit": None}),
}
SAMPLED = {"max_new_tokens": 5, "do_sample": True, "temperature": 1.3}
ANSWER = " golf, chess and"


def make(seed=0):
    tokenizer = tiny.byte_level()
    return tiny.llama(len(tokenizer), seed=seed), tokenizer


def attribute(model, tokenizer, name, accelerator=None, absent="delete", **more):
    method, unit, arguments = CASES[name]
    inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines=absent)
    value = arguments.get("attr_target", "log_prob")
    surrogate = arguments.get("surrogate")
    of_constructor = ("attr_target", "surrogate")
    arguments = {key: value for key, value in arguments.items() if key not in of_constructor}
    attribution = GenerationAttribution(
        method(model), tokenizer, value, accelerator=accelerator, surrogate=surrogate
    )
    arguments = {"target": ANSWER, "perturbations_per_eval": 4, **arguments, **more}
    if arguments.get("target") is None:
        arguments["gen_args"] = SAMPLED
    with warnings.catch_warnings():  # of a copy of half the bytes
        warnings.filterwarnings("ignore", "the surrogate saves nothing")
        return attribution.attribute(inp, **arguments)


def numbers(result):
    return {
        "masks": result.masks,
        "values": result.values,
        "target": result.target,
        "full_attr": result.full_attr,
        "seq_attr": result.seq_attr,
        "n": result.n_evaluations,
        "rows": result.provenance["rows_by_process"],
    }


def all_cases(accelerator=None):
    """Every method, and a generated target, as tensors."""
    model, tokenizer = make()
    found = {name: numbers(attribute(model, tokenizer, name, accelerator)) for name in CASES}
    found["by the model"] = numbers(
        attribute(model, tokenizer, "KernelShap", accelerator, ModelBaselines())
    )
    found["generated"] = numbers(
        attribute(model, tokenizer, "ShapleyValueSampling", accelerator, target=None)
    )
    found["answers"] = answered(model, tokenizer, accelerator)
    return found


def answered(model, tokenizer, accelerator=None):
    """Traces, total effects and attributions by answers: what else shares its work."""
    inp = TextSegmentInput("Dave lives in Palm Coast", tokenizer, baselines=["Ann"] * 5)
    trace = ActivationPatching(model, tokenizer, accelerator=accelerator).trace(
        inp, " golf", feature=0, kind="noise", n_draws=2, perturbations_per_eval=8
    )
    inp = TextSegmentInput(PROMPT, tokenizer, "sentence", baselines="delete")
    whole = GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=accelerator)
    effect = whole.total_effect(inp, n_samples=4, gen_args={"max_new_tokens": 5})
    smile = GenerationAttribution(
        Smile(model, lambda a, b: float(a != b)), tokenizer, accelerator=accelerator
    ).attribute(inp, gen_args={"max_new_tokens": 4}, n_samples=16)
    search = whole.counterfactuals(inp, " golf, chess", flips=0.5)
    return {
        "counterfactuals": torch.tensor([[one.token, *one.values] for one in search]),
        "trace": trace.effects,
        "rows": trace.provenance["rows_by_process"],
        "total effect": effect.values,
        "written": effect.answers,
        "smile": smile.token_attr,
    }


def replace_forward(model, before):
    """Has a function called with the number of rows before every pass."""
    forward = type(model).forward.__get__(model)

    def replaced(*args, **arguments):
        before(len(arguments["input_ids"]))
        return forward(*args, **arguments)

    replaced.__signature__ = inspect.signature(forward)
    model.forward = replaced


def failures(accelerator):
    """What comes of errors, of too little memory, of unequal arguments, on every process."""
    found = {}
    rank = accelerator.process_index
    is_last = rank == accelerator.num_processes - 1
    model, tokenizer = make()
    calls = []

    def fail(n_rows):
        calls.append(n_rows)
        time.sleep(0.01)
        if is_last and len(calls) == 4:
            raise KeyError("broken here")

    replace_forward(model, fail)
    began = time.monotonic()
    try:
        attribute(model, tokenizer, "KernelShap", accelerator)
    except KeyError as error:
        found["raised"] = [repr(error), *error.__notes__]
    found["seconds"] = time.monotonic() - began

    def short_of_memory(n_rows):
        time.sleep(0.005)
        if is_last and n_rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    replace_forward(model, short_of_memory)
    found["memory"] = numbers(
        attribute(model, tokenizer, "KernelShap", accelerator, perturbations_per_eval=16)
    )
    model, tokenizer = make()
    for name, more in (("seed", {"seed": rank}), ("argument", {"n_samples": -is_last or 9})):
        try:
            attribute(model, tokenizer, "KernelShap", accelerator, **more)
        except ValueError as error:
            found[name] = str(error)
    found["afterwards"] = numbers(attribute(model, tokenizer, "KernelShap", accelerator))
    return found


def sharded(accelerator, folder):
    """A model that two processes hold together, as often as there are two."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    n = accelerator.num_processes
    config = DistributedConfig(tp_size=2, dp_replicate_size=n // 2 if n > 2 else None)
    model = LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=config).eval()
    return model, tiny.byte_level()


def tensor_parallel(accelerator, folder):
    """Methods and records with such models."""
    n = accelerator.num_processes
    processes._REMEMBERED = 3  # as if there were hundreds of records
    model, tokenizer = sharded(accelerator, folder)
    found = {
        name: numbers(attribute(model, tokenizer, name, accelerator))
        for name in ("FeatureAblation", "KernelShap")
    }
    found["generated"] = numbers(
        attribute(model, tokenizer, "ShapleyValueSampling", accelerator, target=None)
    )
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=accelerator)
    some = [*records(4 * n)[:5], {"prompt": ""}, *records(4 * n)[5:]]
    before = stored(accelerator)
    report = attribute_dataset(some, attribution, folder / "sharded results")
    assert (
        stored(accelerator) == before
    )  # of a thousand records a thousand times as much would be left
    found["dataset"] = [report.n_written, report.n_skipped, report.failures]
    try:
        GenerationGradientAttribution(LayerGradientShap(model, None), tokenizer)
    except ValueError as error:
        found["gradients"] = str(error)
    return found


def records(n):
    return [
        {"prompt": f"Dave {i} lives in Palm Coast.", "target": " golf and chess"} for i in range(n)
    ]


def dataset(accelerator, folder):
    model, tokenizer = make()
    method = FeatureAblation(model)
    # The accelerator may be given in either place, or in both.
    shared = GenerationAttribution(method, tokenizer, accelerator=accelerator)
    plain = GenerationAttribution(method, tokenizer)
    broken = [*records(20)[:7], {"prompt": ""}, *records(20)[7:]]
    out = folder / "results"
    before = stored(accelerator)
    reports = [
        attribute_dataset(broken, shared, out),
        attribute_dataset(broken, plain, out, accelerator=accelerator),
        attribute_dataset(broken, shared, out, accelerator=accelerator),
    ]
    assert stored(accelerator) == before
    return [[r.n_written, r.n_skipped, r.failures] for r in reports]


def stored(accelerator):
    """How much is in the store that the processes share."""
    accelerator.wait_for_everyone()
    found = _compat.process_store("").underlying_store.num_keys()
    accelerator.wait_for_everyone()
    return found


def other_weights(accelerator, folder):
    """What becomes of processes that were given different models."""
    model, tokenizer = make(seed=accelerator.process_index)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=accelerator)
    try:
        attribute_dataset(records(4), attribution, folder / f"unequal {accelerator.num_processes}")
    except ValueError as error:
        return str(error)
    return None


def slowed(seconds=0.004):
    model, tokenizer = make()
    replace_forward(model, lambda n_rows: time.sleep(seconds))
    return model, tokenizer


N_MANY, LONG = 400, [5 + i % 40 for i in range(30)]
LARGE = (1000, 5000)  # target tokens, features


def many_rows(folder, accelerator=None):
    """A run whose rows, each with the storage that it is a view of, are 40 MB."""
    model, tokenizer = make()
    more = {"target": LONG, "n_samples": N_MANY, "checkpoint": folder / "many.safetensors"}
    return numbers(attribute(model, tokenizer, "KernelShap", accelerator, **more))


def large_part(number):
    """A quarter of the solution of a large game."""
    n_target, n_features = LARGE
    draw = torch.Generator().manual_seed(number)
    parts = torch.randn(2, n_target // 4, n_features, generator=draw, dtype=torch.float64)
    ends = torch.randn(2, n_target, generator=draw, dtype=torch.float64)[:, : n_target // 4]
    return Solution(parts[0], parts[1], *ends)


def large(accelerator):
    """What is found of large things on every process: a digest of each, and what is left over."""
    model, _ = make()
    group = processes.Processes.of(accelerator, model)
    before = stored(accelerator)
    with group.session("a test"):
        numbers_of = torch.arange(3_000_000, dtype=torch.float64)
        decided = group.decide(lambda: (numbers_of.view(1000, 3000)[:, 7], numbers_of, "x" * 9**7))
        solution = Solution.joined(group.each(range(4), large_part))
    assert stored(accelerator) == before
    return [digest([*decided]), digest([*vars(solution).values()])]


def together(folder):
    """What needs no process of its own."""
    accelerator = Accelerator(cpu=True)
    found = {"cases": all_cases(accelerator), "failures": failures(accelerator)}
    found["dataset"] = dataset(accelerator, folder)
    found["other weights"] = other_weights(accelerator, folder)
    n = accelerator.num_processes
    checkpoint = folder / f"half {n}.safetensors"
    model, tokenizer = slowed()
    found["resumed"] = numbers(
        attribute(model, tokenizer, "KernelShap", accelerator, checkpoint=checkpoint)
    )
    found["many rows"] = many_rows(folder, accelerator)
    found["large"] = large(accelerator)
    found["sharded"] = tensor_parallel(accelerator, folder)
    torch.save(found, folder / f"{n}.{accelerator.process_index}.pt")


def raising(folder):
    accelerator = Accelerator(cpu=True)
    model, tokenizer = make()

    def fail(n_rows):
        if accelerator.process_index == 1:
            raise ZeroDivisionError("no luck")
        time.sleep(0.05)

    replace_forward(model, fail)
    attribute(model, tokenizer, "KernelShap", accelerator)


def killed(folder):
    """One process is gone in the middle, and nothing like torchrun looks after the other."""
    accelerator = Accelerator(cpu=True)
    model, tokenizer = make()

    def die(n_rows):
        time.sleep(0.02)
        if accelerator.process_index == int(os.environ["HOW"]):
            os.kill(os.getpid(), signal.SIGKILL)

    replace_forward(model, die)
    try:
        attribute(model, tokenizer, "KernelShap", accelerator)
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(3)  # torch waits for its lost process group when it is taken down


def half_a_pass(folder):
    """One of two processes that hold a model together does not come to the end of a pass."""
    how = os.environ["HOW"]
    store._FAREWELL, store._SILENCE, store._STUCK = 1.0, 3.0, 5.0
    accelerator = Accelerator(cpu=True)
    model, tokenizer = sharded(accelerator, folder)
    processes._TOGETHER, passes = 2.0, []

    def leave(_, arguments):
        passes.append(len(arguments[0]))
        # The second pass tries whether there is a way: where all fail that is no error.
        is_time = len(passes) == 2 if how == "raised" else passes[-1] > 2
        if accelerator.process_index != 1 or not is_time:
            return
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("broken here")

    # The first layer's sums over both processes are through, the second one's never come.
    model.model.layers[1].register_forward_pre_hook(leave)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer, accelerator=accelerator)
    status = 0
    try:
        attribute_dataset(records(6), attribution, folder / how)
    except Exception as error:
        print(f"raised {type(error).__name__}: {error}", *error.__notes__, sep="\n", flush=True)
        status = 3
        if how == "caught" and accelerator.process_index == 1:
            try:
                attribution.attribute(
                    TextSegmentInput(PROMPT, tokenizer, baselines="delete"), ANSWER
                )
            except RuntimeError as again:
                print(again, flush=True)
            time.sleep(15)  # it does not end, and with it no connection
    os._exit(status)  # torch waits for its lost process group when it is taken down


class Group:
    """Ranks of one process group, forked: they share what has been imported, which takes seconds.

    Args:
        run: What each of them runs.
        n: How many.
        folder: What they print goes to files of it, by `name` and rank.
        name: ``HOW`` in their environment.
    """

    def __init__(self, run, n, folder, name):
        self.pids = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(n):
            self.pids[f"{name}.{rank}"] = pid = os.fork()
            if pid:
                continue
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HOW": name}
            os.environ |= {"WORLD_SIZE": str(n), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(folder / f"{name}.{rank}", "w") as printed:
                for output in (1, 2):
                    os.dup2(printed.fileno(), output)
            # The watchdog's thread is not forked. What hangs tells where as well, and ends.
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(240)
            status = 1
            try:
                run(folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)


def statuses(groups, stopped=()):
    """Exit statuses of ranks by name, and how many seconds after the first of them each ended."""
    names = {pid: name for group in groups for name, pid in group.pids.items()}
    found, began = {}, None
    while names:
        pid, status = os.waitpid(-1, 0)
        began = time.monotonic() if began is None else began
        found[names.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        for pid in [pid for pid, name in names.items() if {*names.values()} <= {*stopped}]:
            os.kill(pid, signal.SIGKILL)
    return found


def groups_of_two_and_four(folder):
    """One after the other, for both write the same names."""
    for n in (2, 4):
        found = statuses([Group(together, n, folder, f"group of {n}")])
        (folder / f"group of {n}.json").write_text(json.dumps(found))


def killed_in_turn(folder):
    found = statuses([Group(killed, 2, folder, rank) for rank in ("0", "1")])
    (folder / "killed.json").write_text(json.dumps(found))


def command(folder):
    """The command line with the arguments in a file; what it says goes to another one."""
    name = f"{os.environ['HOW']}.{os.environ['RANK']}"
    with open(folder / f"{name}.err", "w") as said:
        os.dup2(said.fileno(), 2)
    os._exit(main(json.loads((folder / f"{os.environ['HOW']}.arguments").read_text())))


def commands(folder):
    """Each on two processes."""
    names = sorted(path.stem for path in folder.glob("*.arguments"))
    found = statuses([Group(command, 2, folder, name) for name in names])
    (folder / "commands.json").write_text(json.dumps(found))


def half_passes(folder):
    """All kinds of it at the same time."""
    hows = ("raised", "caught", "killed", "stopped")
    groups = [Group(half_a_pass, 2, folder, how) for how in hows]
    found = statuses(groups, stopped=("stopped.1",))
    (folder / "half passes.json").write_text(json.dumps(found))


def long_run(folder):
    """A run that takes seconds, to be killed; says how many passes it took."""
    model, tokenizer = make()
    passes = []

    def wait(n_rows):
        passes.append(n_rows)
        time.sleep(0.02)

    replace_forward(model, wait)
    name = folder / "long.safetensors"
    result = attribute(model, tokenizer, "ShapleyValueSampling", n_samples=60, checkpoint=name)
    torch.save({**numbers(result), "passes": len(passes)}, folder / "long.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(500, exit=True)  # what hangs tells where
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
