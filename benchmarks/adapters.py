"""Others' shipped reward functions in our loop and in their own package: equal numbers. Writes results/adapters.json.

    python -m benchmarks.adapters [--gsm8k model_solutions.jsonl] [--openrlhf CHECKOUT]

Needs .venv-rewards (`make bench-rewards`). TRL's, verl's and verifiers' functions come from their wheels. OpenRLHF's
wheel has its grader, not its example reward functions: --openrlhf names a checkout that has them. slime is not on PyPI
(the package of that name is another one). Ours run inside GRPOTrainer and inside verl's reward managers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import CACHE, ROOT, machine, write_result
from rewards import RewardInput, build_rewards

CLAIM = "Reward functions of TRL, verl, OpenRLHF and verifiers give the same numbers here as in their own package."
PYTHON = ROOT / ".venv-rewards" / "bin" / "python"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
GLUE = "benchmarks/peers/glue_{}.py:{}"
QUESTIONS = 75  # of four solutions each
TIMEOUT = 60.0  # of a call; a slow grader is not what is compared
OURS: dict[str, Any] = {"exact_match": {"weight": 1.0, "pattern": "([0-9]+)"}, "length": {"weight": -0.5, "max": 20}}

HAND_MADE = [  # completion, gold
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"so $x=\frac{1}{2}$", r"\frac{1}{2}"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{41} no, \boxed{42}", "42"),
    (r"\boxed{42\%}", "42"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{{1,2,3", "3"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\pi/6}", "30^\\circ"),
    ("Answer: 42", "42"),
    ("Answer: $\\frac{2}{4}$", "0.5"),
    ("#### -7", "-7"),
    ("#### $1,234.50", "1234.50"),
    ("The answer is 12.", "12"),
    ("<answer> Paris </answer>", "paris"),
    ("<answer>the Paris</answer> <answer>Paris</answer>", "Paris"),
    ("<think>3</think>\\boxed{3}", "3"),
    ("<think></think>", "3"),
    ("<think>a</think></think>", "3"),
    ("la la la la la la la la la la la la", "la"),
    ("Step 2: $\\boxed{8}$", "8"),
    ("", "1"),
    ("   ", "1"),
    ("答案是 \\boxed{5}", "5"),
    ("\\boxed{5", "5"),
    ("word " * 400 + "\\boxed{5}", "5"),
]


@dataclass(frozen=True)
class Case:
    """A function of a framework; `gold`: how it wants the gold answer."""

    name: str
    function: str
    style: str
    gold: str = "text"
    kwargs: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    dispatched: bool = False  # verl: called by names

    def needs_chat(self) -> bool:
        return self.style in ("trl", "verifiers")

    def gold_of(self, text: str) -> Any:
        return {"text": text, "math": f"${text}$", "targets": {"target": [text]}}[self.gold]


def cases(openrlhf: Path | None) -> list[Case]:
    score = "verl.utils.reward_score"
    found = [
        *(Case(f"trl {name}", f"trl.rewards.accuracy_rewards:{name}", "trl", "math")
          for name in ("accuracy_reward", "reasoning_accuracy_reward")),
        Case("trl think_format_reward", "trl.rewards:think_format_reward", "trl", "math"),
        *(Case(f"trl {name}", GLUE.format("trl", name), "trl", "math")
          for name in ("cosine", "repetition", "overlong")),
        *(Case(f"verl {name}", f"{score}.{name}:compute_score", "verl")
          for name in ("gsm8k", "math_reward", "math_dapo", "math_verify", "prime_math", "geo3k")),
        Case("verl gsm8k flexible", f"{score}.gsm8k:compute_score", "verl", kwargs={"method": "flexible"}),
        Case("verl math_dapo strict", f"{score}.math_dapo:compute_score", "verl", kwargs={"strict_box_verify": True}),
        *(Case(f"verl search_r1 {name}", f"{score}.search_r1_like_qa_em:{name}", "verl", "targets")
          for name in ("compute_score", "compute_score_subem")),
        *(Case(f"verl dispatcher, {source}", f"{score}:default_compute_score", "verl",
               "targets" if source.startswith("search") else "text", fields={"data_source": source}, dispatched=True)
          for source in ("openai/gsm8k", "lighteval/MATH", "math_dapo", "numina_olympiads", "searchR1_nq")),
        Case("openrlhf grade_answer", GLUE.format("openrlhf", "reward_func"), "openrlhf"),
        *(Case(f"verifiers {name}", GLUE.format("verifiers", name), "verifiers")
          for name in ("math", "weighted", "both")),
    ]  # fmt: skip
    if openrlhf is not None:
        path = openrlhf.resolve() / "examples" / "python" / "math_reward_func.py"
        found.append(Case("openrlhf math_reward_func.py", f"{path}:reward_func", "openrlhf"))
    return found


def samples(gsm8k: Path) -> list[dict[str, Any]]:
    """Labelled solutions of GSM8K, their last line written in every framework's way in turn, and texts made by hand."""
    endings = (
        "A: {}",
        "#### {}",
        r"The answer is $\boxed{{{}}}$.",
        r"</think>\boxed{{{}}}",
        "Answer: {}",
        "<answer>{}</answer>",
    )
    rows = [json.loads(line) for line in gsm8k.read_text().splitlines()[:QUESTIONS]]
    made = []
    for row in rows:
        gold = row["ground_truth"].rpartition("A: ")[2].replace(",", "")
        for model in MODELS:
            body, _, answer = row[model]["solution"].rpartition("A: ")
            ending = endings[len(made) % len(endings)]
            text = ("<think>" if "think" in ending else "") + body + ending.format(answer)
            made.append({"prompt": row["question"], "completion": text, "gold": gold})
    made += [{"prompt": "A question", "completion": text, "gold": gold} for text, gold in HAND_MADE]
    return [{**sample, "completion_ids": list(sample["completion"].encode())} for sample in made]


def here(chosen: list[Case], given: list[dict[str, Any]]) -> dict[str, list[tuple[float | None, dict[str, Any]]]]:
    """Case -> (value, info) of every sample, through build_rewards; cases with the same inputs share the processes."""
    alike: dict[str, list[Case]] = {}
    for case in chosen:
        alike.setdefault(repr((case.gold, case.needs_chat(), case.fields)), []).append(case)
    results = {}
    for members in alike.values():
        one, inputs = members[0], []
        for sample in given:
            gold = one.gold_of(sample["gold"])
            prompt = [{"role": "user", "content": sample["prompt"]}] if one.needs_chat() else sample["prompt"]
            fields = {"answer": gold, "solution": gold, **one.fields}
            inputs.append(RewardInput(prompt, sample["completion"], fields, sample["completion_ids"]))
        options = {
            case.name: {"function": case.function, "style": case.style, "kwargs": case.kwargs, "timeout": TIMEOUT}
            for case in members
        }
        with build_rewards(options, memory_gb=16.0) as rewards:
            scores = rewards.score(inputs)
        results |= {name: [(score.parts[name], score.info[name]) for score in scores] for name in options}
    return results


def there(module: str, *arguments: str | Path) -> Any:
    """What a module of benchmarks/peers prints last, run in .venv-rewards."""
    if not PYTHON.exists():
        raise SystemExit("error: .venv-rewards is missing; run `make bench-rewards`")
    done = subprocess.run(
        [PYTHON, "-m", f"benchmarks.peers.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def written(name: str, content: Any) -> Path:
    folder = CACHE / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def theirs_here(chosen: list[Case], given: list[dict[str, Any]]) -> dict[str, Any]:
    """Every function in our loop and in its own package."""
    golds = [[[place, case.gold_of(sample["gold"])] for place, sample in enumerate(given)] for case in chosen]
    rows = [asdict(case) | {"golds": gold} for case, gold in zip(chosen, golds)]
    native = there("shipped_rewards", written("samples.json", given), written("cases.json", rows))
    sys.path.append(str(next((PYTHON.parent.parent / "lib").glob("python3*/site-packages"))))  # last: ours go first
    everything, results = here(chosen, given), {}
    for case in chosen:
        ours, own = everything[case.name], native[case.name]
        wrong = [place for place, ((value, _), other) in enumerate(zip(ours, own, strict=True)) if value != other]
        results[case.name] = {
            "style": case.style,
            "samples": len(own),
            "distinct_values": len({value for value, _ in ours}),
            "without_value": sum(value is None for value, _ in ours),
            "failures": sum(info["status"] not in ("ok", "not_applicable") for _, info in ours),
            "differences": len(wrong),
        }
        print(f"{case.name}: {len(own)} samples, {len(wrong)} differences", flush=True)
        for place in wrong[:3]:
            print(f"  {given[place]['completion'][-60:]!r}: {ours[place]} here, {own[place]} there", flush=True)
    return results


def ours_there() -> dict[str, Any]:
    """Our rewards in two steps of GRPOTrainer and in verl's reward managers, against direct calls."""
    mapping = written("ours.json", OURS)
    texts = [{"completion": text, "gold": "12"} for text in ("12", "13", "abc 12", "a1", "no", "12" * 20)]
    with build_rewards(OURS) as rewards:
        run = there("our_rewards", "trl", mapping)
        results = {"GRPOTrainer, 2 steps": _compared([
            (value, rewards.score([RewardInput(prompt, completion, {"answer": gold}, ids)])[0].value)
            for call in run["calls"]
            for prompt, completion, ids, gold, value in zip(*(call[k] for k in (
                "prompts", "completions", "completion_ids", "answer", "values")), strict=True)
        ])}  # fmt: skip
        direct = [rewards.score([RewardInput("", t["completion"], {"answer": t["gold"]})])[0].value for t in texts]
        for manager, rows in there("our_rewards", "verl", mapping, written("texts.json", texts)).items():
            results[f"verl, {manager}"] = _compared(
                list(zip([row["reward_score"] for row in rows], direct, strict=True))
            )
    for name, result in results.items():
        print(f"ours in {name}: {result['samples']} samples, {result['differences']} differences")
    return results


def _compared(pairs: list[tuple[float | None, float | None]]) -> dict[str, int]:
    return {
        "samples": len(pairs),
        "distinct_values": len({pair[0] for pair in pairs}),
        "differences": sum(one != other for one, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gsm8k", type=Path, default=GSM8K, help="example_model_solutions.jsonl of openai/grade-school-math"
    )
    parser.add_argument("--openrlhf", type=Path, help="a checkout of OpenRLHF, for its example reward function")
    arguments = parser.parse_args()
    if not arguments.gsm8k.exists():
        raise SystemExit(f"error: --gsm8k {arguments.gsm8k} does not exist; give the file of labelled solutions")
    if arguments.openrlhf is None:
        print("note: no --openrlhf CHECKOUT given, so OpenRLHF's example reward function is left out")
    before = machine()
    theirs = theirs_here(cases(arguments.openrlhf), samples(arguments.gsm8k))
    ours = ours_there()
    every = [*theirs.values(), *ours.values()]
    summary = {key: sum(result.get(key, 0) for result in every) for key in ("samples", "differences", "failures")}
    summary["functions"] = len(theirs)
    results = {"summary": summary, "theirs_here": theirs, "ours_there": ours, "versions": there("package_versions")}
    print(f"{summary['functions']} functions, {summary['samples']} samples, {summary['differences']} differences")
    print(write_result("adapters", CLAIM, before, results))
    if summary["differences"] or summary["failures"]:
        raise SystemExit(f"error: {summary['differences']} differences, {summary['failures']} failures")


if __name__ == "__main__":
    main()
