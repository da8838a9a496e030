"""`grpo rewards ...`: what rewards there are, a recipe's rewards on its data, and how good rewards are offline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

rewards_app = typer.Typer(no_args_is_help=True, help="Rewards: list, check, evaluate offline, train.")

# `--section.key=value` is taken by grpo.overrides, not by typer
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@rewards_app.command("list")
def rewards_list() -> None:
    """The built-in rewards: where each runs, the data fields it needs, what it gives.

    Example: grpo rewards list
    """
    from rich.console import Console
    from rich.table import Table

    from rewards.catalogue import catalogue

    table = Table("reward", "runs", "needs", "gives", box=None, header_style="bold")
    for entry in catalogue():
        table.add_row(*(entry[key] for key in ("name", "runs", "needs", "gives")))
    Console().print(table, markup=False, highlight=False)


@rewards_app.command("verdicts")
def rewards_verdicts(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL or Parquet: prompt, completion, reason, label.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    scale: Annotated[str, typer.Option(help="Lowest and highest label.")] = "0,1",
    template: Annotated[str, typer.Option(help="The reward's template: text, or a .txt or .md file.")] = "",
    rubric: Annotated[str, typer.Option(help="The reward's rubric.")] = "",
    reference: Annotated[str, typer.Option(help="Show the row's answer: auto, always or never.")] = "auto",
    include_thinking: Annotated[bool, typer.Option(help="Show what comes before </think>.")] = False,
    chat: Annotated[bool, typer.Option(help="Prompts as chat messages, for a reward with chat: true.")] = False,
) -> None:
    """Labelled completions with reasons become SFT data for the model of generative_reward, with the same options.

    Example: grpo rewards verdicts labelled.jsonl --out verdicts.jsonl --scale 0,10
    """
    from grpo.config import ConfigError, DataConfig
    from grpo.log import write_rows
    from grpo.sources import load_rows
    from rewards.grading import grading
    from rewards.verdicts import sft_rows

    ends = [end.strip() for end in scale.split(",")]
    if len(ends) != 2 or not all(end.lstrip("-").isdigit() for end in ends):
        raise ConfigError(f"--scale {scale!r} must be two whole numbers with a comma between them, e.g. 0,10")
    how = grading("generative_reward", template, rubric, [int(end) for end in ends], reference, include_thinking)
    rows = [(row.where, row.columns) for row in load_rows(DataConfig(path=data, holdout=0.0))[0]]
    made = list(sft_rows(rows, how, chat))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, made)
    print(f"{out}: {len(made):,} verdicts ({len(rows) - len(made):,} rows left out: nothing to judge)")
    print(f"train on it: grpo sft CONFIG --data.path={out} --data.completion_column=completion --data.holdout=0")


@rewards_app.command("train", context_settings=OVERRIDES)
def rewards_train(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with a reward_model section.")],
) -> None:
    """Train a reward model on preference pairs or labelled completions; writes it to run.output_dir.

    Example: grpo rewards train configs/reward_model.yaml --data.path=pairs.jsonl --run.output_dir=runs/rm
    """
    from grpo.config import load_config
    from grpo.reward_training import train_reward_model

    result = train_reward_model(load_config(config, ctx.args))
    print(f"{result.describe()}\nmodel: {result.out}")


@rewards_app.command("check", context_settings=OVERRIDES)
def rewards_check(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a recipe; see configs/.")],
    limit: Annotated[int, typer.Option(min=0, help="Rows to check, evenly spread. 0: all.")] = 0,
) -> None:
    """Check a recipe's rewards on its own data: gold answers score full, empty and other rows' answers do not.

    Needs no model. Ends with 1 where a row fails.

    Example: grpo rewards check configs/gsm8k.yaml --limit 500
    """
    from grpo.config import load_config
    from grpo.reward_check import check_rewards, describe

    with _progress() as progress:
        checks = check_rewards(load_config(config, ctx.args), limit, progress)
    print("\n".join(describe(checks)))
    raise typer.Exit(any(check.failed for check in checks))


@rewards_app.command("evaluate", context_settings=OVERRIDES)
def rewards_evaluate(
    ctx: typer.Context,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL or Parquet of prompts and completions.")],
    out: Annotated[Path, typer.Option(help="Directory for report.html, report.json, scores.parquet.")],
    reward: Annotated[str, typer.Option(help="Names, with commas; see grpo rewards list.")] = "",
    rewards: Annotated[str, typer.Option(metavar="YAML", help="A recipe, or its rewards: options, weights.")] = "",
    prompt: Annotated[str, typer.Option(metavar="COLUMN", help="Default: prompt. Dots lead into objects.")] = "",
    completion: Annotated[
        str, typer.Option(metavar="COLUMN[,COLUMN]", help="Default: completion. Several are samples of one prompt.")
    ] = "",
    answer: Annotated[str, typer.Option(metavar="COLUMN", help="Gold answer. Default: answer.")] = "",
    label: Annotated[str, typer.Option(metavar="COLUMN[,COLUMN]", help="1 right, 0 wrong, or a grade.")] = "",
    group: Annotated[str, typer.Option(metavar="COLUMN", help="Samples of one prompt. Default: by the prompt.")] = "",
    probes: Annotated[bool, typer.Option("--probes", help="Try to get paid for nothing.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Score everything so often, to see what changes.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes for checkers and your functions.")] = 2,
    cache: Annotated[str, typer.Option(metavar="FILE", help="Keeps dear verdicts for the next time.")] = "",
    fail_if: Annotated[
        list[str] | None, typer.Option(metavar="CONDITION", help='End with 1 if it holds, e.g. "fpr>0.02,fnr>5%".')
    ] = None,
    unsafe_local: Annotated[
        bool, typer.Option("--unsafe-local", help="Run trusted code without the sandbox (code rewards).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report in --out.")] = False,
) -> None:
    """How good are rewards? Scores completions that are there already and compares with labels, samples, each other.

    Options of a reward: --NAME.option=value. Pairs (chosen, rejected) and GSM8K's model_solutions.jsonl are
    recognised.

    Example: grpo rewards evaluate answers.jsonl --reward math_answer,format_tags --label correct --out runs/lab
    --math_answer.timeout=1 --fail-if "math_answer.fpr>0.02"
    """
    from grpo.reward_check import resources_for
    from rewards.lab.data import Columns
    from rewards.lab.evaluate import Options, evaluate

    mapping = _mapping(reward, rewards, ctx.args, ctx)
    if unsafe_local:
        _allow_unsafe(mapping)
    columns = Columns(prompt, completion, answer, label, group)
    options = Options(columns, workers, cache, repeat, probes, fail_if or (), overwrite)
    with _progress() as progress:
        found = evaluate(data, mapping, out, options, progress, **resources_for(mapping))
    for line in found.report["verdicts"]:
        who = f"{line['reward']}: " if line["reward"] else ""
        remedy = f"; {line['remedy']}" if line["remedy"] else ""
        print(f"{line['level']:<5} {who}{line['text']}{remedy}")
    print(f"{found.report['seconds']['total']:.0f} s; report: {out / 'report.html'}")
    for line in found.failed:
        typer.echo(f"--fail-if {line}", err=True)
    raise typer.Exit(bool(found.failed))


def _mapping(reward: str, file: str, arguments: list[str], ctx: typer.Context) -> dict[str, Any]:
    """Reward name -> weight or options, from --reward, --rewards and --NAME.option=value. Raises ConfigError."""
    import yaml

    from grpo.config import Config, ConfigError
    from grpo.overrides import YamlLoader, override

    given: dict[str, Any] = {}
    if file:
        if not Path(file).is_file():
            raise ConfigError(f"--rewards {file!r} does not exist; name a YAML file")
        try:
            content = yaml.load(Path(file).read_text(encoding="utf-8"), YamlLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--rewards {file!r} is not YAML: {' '.join(str(error).split())}") from None
        given = content.get("rewards", content) if isinstance(content, Mapping) else {}
        if not isinstance(given, Mapping) or not given:
            raise ConfigError(f"--rewards {file!r} holds no rewards; write `rewards:` with a name and a weight")
    names = [name.strip() for name in reward.split(",") if name.strip()]
    if not names and not given:
        raise ConfigError("no reward given; name one with --reward NAME (see `grpo rewards list`) or --rewards YAML")
    mapping = {name: given.get(name, 1.0) for name in names or given}
    for argument in arguments:
        match = re.match(r"--([\w-]+)\.[\w.-]+=", argument)
        if match is None:
            known = [option for parameter in ctx.command.params for option in parameter.opts if option[:2] == "--"]
            near = difflib.get_close_matches(argument.split("=")[0], known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown argument {argument!r}; did you mean {near!r}? (a reward's: --NAME.option=value)"
            )
        if match[1] not in mapping:
            raise ConfigError(f"{argument}: {match[1]!r} is none of the rewards {', '.join(mapping)}")
        override(mapping, argument, Config)
    return mapping


def _allow_unsafe(mapping: dict[str, Any]) -> None:
    """Sets the option unsafe_local of the rewards that have it. Raises ConfigError where none has."""
    import importlib
    import inspect

    from grpo.config import ConfigError
    from rewards.build import REGISTRY

    found = False
    for name, options in mapping.items():
        kind = options.get("kind", name) if isinstance(options, Mapping) else name
        module, _, attribute = REGISTRY.get(kind, "").partition(":")
        if (
            module
            and "unsafe_local" in inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        ):
            options = dict(options) if isinstance(options, Mapping) else {"weight": options}
            mapping[name], found = {**options, "unsafe_local": True}, True
    if not found:
        raise ConfigError(f"--unsafe-local is about rewards that run code, and there is none in {', '.join(mapping)}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr while the work goes on, gone when it is done. Called with what is done, so far, in all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield show
