"""What the numbers mean, in plain words: at most 11 lines, the worst first, each with what to do about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.lab.answers import final_answer

MOST = 11  # lines; the console adds one that says where the report is
LEVELS = ("bad", "warn", "note", "good")
Rows = Sequence[Mapping[str, Any]]


def verdicts(report: Mapping[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """[{"level", "reward", "text", "remedy"}], worst first. `rows` are those of scores.parquet."""
    found: list[dict[str, Any]] = []
    labelled = bool(report["data"]["labelled"])
    for name, block in report["rewards"].items():

        def say(level: str, text: str, remedy: str = "", name: str = name) -> None:
            found.append({"level": level, "reward": name, "text": text, "remedy": remedy})

        _failures(block, say)
        flat = _never_varies(name, block, rows, say)
        if not flat:
            if labelled:
                _labels(name, block, rows, say)
            _groups(block, labelled, say)
            _length(block, say)
        _operation(block, say)
    _probes(report, found)
    _together(report, found)
    if not labelled:
        found.append(
            {
                "level": "note",
                "reward": None,
                "text": "no labels, so nothing here says whether the rewards are right",
                "remedy": "name a column of 0 and 1 with --label",
            }
        )
    return sorted(found, key=lambda line: LEVELS.index(line["level"]))[:MOST]


def percent(share: float | None) -> str:
    """A share as people read it."""
    return "?" if share is None else f"{100 * share:.1f} %"


Say = Callable[..., None]


def _failures(block: Mapping[str, Any], say: Say) -> None:
    total, statuses = block["samples"], block["statuses"]
    remedies = {
        "error": ("bad", "fix the reward: no error is ever counted as 0, and a run stops at max_error_share"),
        "timeout": ("bad", "raise its timeout, or make it faster"),
        "unparseable_gold": ("bad", "these gold answers cannot be read; fix them or choose their column with --answer"),
        "not_applicable": ("note", "right if it is not for these rows; else see what it needs (token ids, columns)"),
    }
    for status, (level, remedy) in remedies.items():
        count = statuses[status]
        if count:
            why = next((f": {row['reason']}" for row in block["reasons"] if row["status"] == status), "")
            say(level, f"{count:,} of {total:,} samples have no score, status {status}{why}", remedy)


def _never_varies(name: str, block: Mapping[str, Any], rows: Rows, say: Say) -> bool:
    """A reward that is the same for all samples of every group teaches nothing; often the format is at fault."""
    if block["distinct"] > 1 and block["zero_variance_observed"] != 1.0:
        return False
    if not block["distinct"]:
        return True
    value = next(row[f"{name}.value"] for row in rows if row[f"{name}.value"] is not None)
    what = f"gives {value:g} to every sample" if block["distinct"] == 1 else "never varies within a prompt"
    confusion = block["confusion"]
    right = confusion["tp"] + confusion["fn"] if confusion else 0
    if right and block["fnr"] == 1.0:
        missed = [row for row in rows if row["label"] is not None and row["label"] >= 0.5]
        say(
            "bad",
            f"{what}, also to the {right:,} right ones: every group has zero variance and teaches nothing",
            _mismatch(missed) if block["needs"] else "ask for its format in the prompt, or leave it out",
        )
    else:
        say(
            "bad",
            f"{what}: every group has zero variance and teaches nothing",
            "look at what it reads; probe it with --probes",
        )
    return True


def _mismatch(missed: Rows) -> str:
    """The remedy for right answers that go unseen: what they end in."""
    forms = Counter(final_answer(row["completion"])[0] for row in missed)
    form, count = forms.most_common(1)[0]
    ends = {
        "A:": "'A: n'",
        "####": "'#### n'",
        "\\boxed": "\\boxed{}",
        "<answer>": "<answer> tags",
        "answer:": "'answer: ...'",
        "number": "a bare number",
        "none": "no answer at all",
    }[form]
    return (
        f"template mismatch: {percent(count / len(missed))} of them end in {ends}, which it does not read; choose a "
        "reward that does (gsm8k_answer, math_answer, exact_match with a pattern), or ask for its format in the prompt"
    )


def _labels(name: str, block: Mapping[str, Any], rows: Rows, say: Say) -> None:
    confusion = block["confusion"]
    if not confusion or block["accuracy"] is None:
        return
    scored = sum(confusion[key] for key in ("tp", "fp", "fn", "tn"))
    threshold = block["threshold"]
    if confusion["fp"] + confusion["fn"] == 0:
        say("good", f"agrees with the labels on all {scored:,} samples: 100.0 %, no false positive, no false negative")
        return
    if block["threshold_from"] != "values":  # a score, not a verdict: how it ranks says more
        pairs = (
            "" if block["pair_accuracy"] is None else f", within a prompt {percent(block['pair_accuracy'])} of pairs"
        )
        if block["auc"] is not None:
            bad = block["auc"] < 0.5
            say(
                "bad" if bad else "note",
                f"ranks right above wrong with AUC {block['auc']:.3f}{pairs}",
                "it prefers wrong answers; turn its sign or leave it out" if bad else "",
            )
        return
    say(
        "good" if block["accuracy"] >= 0.99 else "note",
        f"agrees with the labels on {percent(block['accuracy'])} of {scored:,} samples "
        f"(FPR {percent(block['fpr'])}, FNR {percent(block['fnr'])})",
    )
    if block["youden_j"] is not None and block["youden_j"] <= 0:
        say(
            "bad",
            f"Youden's J is {block['youden_j']:.2f}: it pays wrong answers as readily as right ones",
            "do not train on it; look at disagreements.jsonl",
        )
    graded = [row for row in rows if row["label"] is not None and row[f"{name}.value"] is not None]
    if confusion["fn"]:
        right = [row for row in graded if row["label"] >= 0.5]
        missed = [row for row in right if row[f"{name}.value"] < threshold]
        why, remedy = _why_missed(name, missed, right)
        level = "bad" if block["fnr"] > 0.02 else "warn"
        say(level, f"FNR {percent(block['fnr'])} ({len(missed):,}/{len(right):,} right answers go unpaid){why}", remedy)
    if confusion["fp"]:
        wrong = [row for row in graded if row["label"] < 0.5]
        paid = [row for row in wrong if row[f"{name}.value"] >= threshold]
        level = "bad" if block["fpr"] > 0.02 else "warn"
        first = paid[0]
        say(
            level,
            f"FPR {percent(block['fpr'])} ({len(paid):,}/{len(wrong):,} wrong answers are paid), "
            f"e.g. {_place(first)} with gold {str(first['answer'])[-40:]!r}",
            "read them in disagreements.jsonl (a label may be wrong); gate it by a stricter reward",
        )


def _why_missed(name: str, missed: Rows, right: Rows) -> tuple[str, str]:
    """What the right answers that go unpaid have in common, and what to do about it."""

    def share(of: Rows, trait: Callable[[Mapping[str, Any]], bool]) -> float:
        return sum(map(trait, of)) / len(of)

    def raw_latex(row: Mapping[str, Any]) -> bool:
        gold = str(row["answer"])
        return bool(re.search(r"\\[a-zA-Z]+|[\^_{}]", gold)) and not re.search(r"\$|\\boxed|\\\(|\\\[", gold)

    if share(missed, raw_latex) >= max(0.5, 1.2 * share(right, raw_latex)):
        count = sum(map(raw_latex, missed))
        return (
            f" - {count:,} of {len(missed):,} have raw LaTeX gold",
            r"wrap the gold answer in \boxed{} or $...$ before parsing, as math_answer does",
        )
    form, count = Counter(final_answer(row["completion"])[0] for row in missed).most_common(1)[0]
    usual = share(right, lambda row: final_answer(row["completion"])[0] == form)
    if count / len(missed) >= max(0.5, 1.5 * usual):
        return f" - {count:,} of {len(missed):,} state their answer as {form}", _mismatch(missed)
    reason, count = Counter(row[f"{name}.reason"] for row in missed).most_common(1)[0]
    if reason:
        return f" - most often ({count:,}): {reason[:80]}", "read them in disagreements.jsonl"
    return (
        f" - e.g. {_place(missed[0])} with gold {str(missed[0]['answer'])[-40:]!r}",
        "read them in disagreements.jsonl",
    )


def _place(row: Mapping[str, Any]) -> str:
    return Path(row["where"]).name  # file:line without its folder


def _groups(block: Mapping[str, Any], labelled: bool, say: Say) -> None:
    shares = {size: share for size, share in block["zero_variance_share"].items() if share is not None}
    if shares:
        size, share = next(iter(shares.items()))
        zero, one = block["all_zero_share"], block["all_one_share"]
        parts = "" if zero is None else f" ({percent(zero)} all wrong, {percent(one)} all right)"
        remedy = ""
        if share > 0.3:
            remedy = "set grpo.dynamic_sampling: true, or sample more per prompt"
            if zero is not None and zero > 2 * one:
                remedy += "; the prompts are hard for this policy"
            elif zero is not None and one > 2 * zero:
                remedy += "; the prompts are easy for this policy"
        say(
            "warn" if share > 0.6 else "note",
            f"{percent(share)} of groups of {size} are all equal and teach nothing{parts}",
            remedy,
        )
    if labelled and block["sign_errors"] is not None and block["sign_errors"] > 0.05:
        say(
            "warn",
            f"{percent(block['sign_errors'])} of samples get an advantage of the wrong sign "
            f"(advantage fidelity {block['advantage_fidelity'] or 0:.2f})",
            "read disagreements.jsonl, or give it less weight than a reward that the labels bear out",
        )


def _length(block: Mapping[str, Any], say: Say) -> None:
    among_wrong = block["spearman_length_wrong"]
    if among_wrong is not None and abs(among_wrong) > 0.3 and block["distinct"] > 2:
        direction = "longer" if among_wrong > 0 else "shorter"
        say(
            "warn",
            f"pays wrong answers more the {direction} they are (Spearman {among_wrong:.2f})",
            "gate it by correctness (gated_by), or add a length reward",
        )


def _operation(block: Mapping[str, Any], say: Say) -> None:
    changed = [row for row in block["determinism"] or [] if row["flips"] or row["status_flips"]]
    if changed:
        worst = max(changed, key=lambda row: (row["flips"] + row["status_flips"]) / row["samples"])
        say(
            "warn",
            f"is not deterministic: with {worst['detail']}, {worst['flips'] + worst['status_flips']:,} of "
            f"{worst['samples']:,} scores change (by up to {worst['max_difference']:.3g})",
            "repeated runs will differ; pin its seed, sampling or batch size, or keep verdicts with --cache",
        )
    if (block["seconds_per_step"] or 0) > 10:
        say(
            "warn",
            f"needs {block['seconds_per_step']:.0f} s for a step of 512 samples (p99 {block['run_ms']['p99']:.0f} ms)",
            "use more workers (--workers, run.reward_workers), or a cheaper reward first",
        )


def _probes(report: Mapping[str, Any], found: list[dict[str, Any]]) -> None:
    for name in report["rewards"]:
        mine = [probe for probe in report["probes"] or [] if probe["reward"] == name]
        failed = [probe for probe in mine if probe["result"] == "fail"]
        for probe in failed[:2]:
            more = f" ({len(failed) - 2} more probes fail)" if len(failed) > 2 and probe is failed[1] else ""
            found.append({"level": "bad", "reward": name, "text": f"{probe['text']}{more}", "remedy": probe["remedy"]})
        if mine and not failed:
            ran = sum(probe["result"] == "pass" for probe in mine)
            found.append({"level": "good", "reward": name, "text": f"passes all {ran} probes", "remedy": ""})


def _together(report: Mapping[str, Any], found: list[dict[str, Any]]) -> None:
    def say(level: str, reward: str | None, text: str, remedy: str) -> None:
        found.append({"level": level, "reward": reward, "text": text, "remedy": remedy})

    for row in report["agreement"]:
        a, b, differ = row["a"], row["b"], row["only_a"] + row["only_b"]
        if differ == 0 and report["rewards"][a]["distinct"] > 1:
            say("note", None, f"{a} and {b} give the same verdict on all samples", "keep the cheaper one")
        elif differ and row["mcnemar_p"] < 0.01 and (row["kappa"] or 0) > 0.4:
            text = f"{a} and {b} differ on {differ:,} of {row['samples']:,} samples (kappa {row['kappa']:.2f})"
            if row["a_right"] is not None:
                text += f"; the labels side with {a} {row['a_right']:,} times, with {b} {row['b_right']:,} times"
            say("note", None, text, "read them in disagreements.jsonl")
    for name, share in ((report["total"] or {}).get("gradient_share") or {}).items():
        if share is None or report["rewards"][name]["distinct"] < 2:  # said already
            continue
        if share < 0:
            say("warn", name, "works against the other rewards of the weighted total", "lower its weight, or gate it")
        elif share < 0.01 or share > 0.95:
            remedy = (
                "raise its weight, or leave it out"
                if share < 0.01
                else "raise the weights of the others, if they matter"
            )
            say("note", name, f"drives {percent(share)} of the gradient of the weighted total", remedy)
