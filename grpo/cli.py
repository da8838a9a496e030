"""The command line: `grpo COMMAND --help`. Bad input ends with exit code 2 and one line, a failed run with 1."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from grpo.rewards_cli import OVERRIDES, rewards_app

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="Make models, look at them, convert them.")
app.add_typer(model_app, name="model")
app.add_typer(rewards_app, name="rewards")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.")]


@app.command(context_settings=OVERRIDES)
def train(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.")] = None,
    resume: Annotated[str, typer.Option(metavar="RUN_DIR", help="Go on with a run from its last checkpoint.")] = "",
) -> None:
    """Train with GRPO: one process, a local Ray cluster or a running one, as run.cluster says.

    Example: grpo train configs/smoke.yaml --grpo.max_steps=100 --run.cluster=inline
    """
    from grpo.trainer import GRPOTrainer

    result = GRPOTrainer(_given(ctx, config), ctx.args, resume).train()
    if result.accuracy_before is not None and result.accuracy_after is not None:
        before, after = 100 * result.accuracy_before, 100 * result.accuracy_after
        print(f"held-out greedy accuracy: {before:.1f} % before, {after:.1f} % after ({after - before:+.1f} points)")
    print(f"{result.seconds:.0f} s; report: {result.report}")


def _given(ctx: typer.Context, config: str | None) -> str | None:
    """The CONFIG argument; None where an override took its place."""
    if config is not None and config.startswith("--"):
        ctx.args.insert(0, config)
        return None
    return config


@app.command(context_settings=OVERRIDES)
def distill(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.")] = None,
    resume: Annotated[str, typer.Option(metavar="RUN_DIR", help="Go on sampling, or choose again.")] = "",
) -> None:
    """Rejection sampling: answers of a policy that the rewards accept become an SFT data set.

    Example: grpo distill configs/distill.yaml --distill.num_generations=16
    """
    from grpo.distill import describe
    from grpo.distill import distill as run

    result = run(_given(ctx, config), ctx.args, resume)
    print(f"{describe(result.selection)}\n{result.data}; report: {result.report}")
    print(f"train on it: grpo sft {result.sft}")


@app.command(context_settings=OVERRIDES)
def sft(ctx: typer.Context, config: ConfigPath) -> None:
    """Supervised fine-tuning on data.completion_column or data.completion_template; writes a model to run.output_dir.

    Example: grpo sft configs/smoke.yaml --run.output_dir=runs/sft --sft.max_steps=500
    """
    _stage(ctx, config, "run_sft")


@app.command(context_settings=OVERRIDES)
def pretrain(ctx: typer.Context, config: ConfigPath) -> None:
    """Next-token training on packed text (data.text_column); writes a model to run.output_dir.

    With an `extend` section it takes the model to a longer context, and says how it retrieves before and after.

    Example: grpo pretrain configs/pretrain.yaml --data.path=corpus.jsonl --pretrain.max_steps=2000
    """
    _stage(ctx, config, "run_pretrain")


def _stage(ctx: typer.Context, path: str, name: str) -> None:
    from grpo import extend, stages
    from grpo.config import load_config
    from grpo.prepare import fresh_run_dir, model_directory

    config = load_config(path, ctx.args)
    run = extend.run_extend if name == "run_pretrain" and config.extend else getattr(stages, name)
    model_dir = model_directory(config)
    out = fresh_run_dir(config)
    run(config, model_dir, out)
    print(f"model: {out}")


@app.command("eval", context_settings=OVERRIDES)
def evaluate(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="CONFIG|RUN_DIR", help="YAML file, or a run: its last checkpoint.")],
    n: Annotated[int, typer.Option(min=1, help="Samples for each prompt.")] = 8,
    k: Annotated[str, typer.Option(help="Values of k for pass@k, with commas.")] = "1,8",
) -> None:
    """pass@1, pass@k and maj@n of a policy on the held-out data, and its greedy accuracy, as JSON.

    Example: grpo eval runs/smoke --n 16 --k 1,4,16
    """
    from grpo.config import ConfigError

    parts = k.split(",")
    if not all(part.strip().isdigit() and 1 <= int(part) <= n for part in parts):
        raise ConfigError(f"--k {k!r} must be numbers from 1 to --n {n}, with commas between them")
    from grpo.evaluate import evaluate_policy

    print(json.dumps(evaluate_policy(source, ctx.args, n, [int(part) for part in parts]), indent=2))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")]) -> None:
    """Write report.html, one self-contained page with curves and a table of samples.

    Example: grpo report runs/smoke
    """
    from grpo.report import write_report

    print(write_report(run_dir))


@app.command(context_settings=OVERRIDES)
def submit(
    ctx: typer.Context,
    config: ConfigPath,
    address: Annotated[str, typer.Option(help="Of the cluster's dashboard, e.g. http://127.0.0.1:8265.")],
) -> None:
    """Send a training job to a running Ray cluster, follow its log and end with its exit code.

    Example: grpo submit configs/smoke.yaml --address http://127.0.0.1:8265 --grpo.max_steps=2
    """
    from grpo.cluster import submit_job
    from grpo.config import load_config

    raise typer.Exit(submit_job(load_config(config, ctx.args), address))


@model_app.command("init")
def model_init(
    spec: Annotated[Path, typer.Argument(metavar="YAML", help="`config:` and `tokenizer:`; see configs/tiny_v3.yaml.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Make a model with random weights, and its tokenizer, from a YAML.

    Example: grpo model init configs/tiny_v3.yaml --out runs/tiny
    """
    from grpo.config import ConfigError
    from model.create import create_model

    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {str(out)!r} is not empty; choose another directory")
    model = create_model(spec, out, seed)
    print(f"{out}: {model.num_parameters:,} parameters")


class WeightForm(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"


@model_app.command("convert")
def model_convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Model directory, BF16, FP32 or FP8.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must be empty or absent.")],
    to: Annotated[WeightForm, typer.Option(help="Form of the weights in it.")],
    ue8m0: Annotated[bool, typer.Option("--ue8m0", help="FP8 scales that are powers of two.")] = False,
) -> None:
    """Convert a model directory between BF16 and DeepSeek's released FP8 form, one tensor at a time.

    Example: grpo model convert DeepSeek-V3 --out DeepSeek-V3-BF16 --to bf16
    """
    from grpo.config import ConfigError
    from model.convert import convert_checkpoint
    from model.info import readable

    if ue8m0 and to is WeightForm.bf16:
        raise ConfigError("--ue8m0 is about FP8 scales and --to is bf16; drop it, or use --to fp8")
    scale_fmt = None if to is WeightForm.bf16 else "ue8m0" if ue8m0 else "float"

    def written(file: str, done: int, total: int) -> None:
        print(f"{out / file}: {readable(done, 'B')} of {readable(total, 'B')}", flush=True)

    convert_checkpoint(source, out, scale_fmt, written=written)


@model_app.command("info")
def model_info(
    path: Annotated[Path, typer.Argument(metavar="DIR_OR_CONFIG_JSON", help="Needs config.json, no weights.")],
    as_json: Annotated[bool, typer.Option("--json", help="Numbers for a program: parameters and bytes.")] = False,
) -> None:
    """Parameters, KV cache and memory of a model, from its config.json alone.

    Example: grpo model info DeepSeek-V3/config.json
    """
    from model import DeepseekV3Config
    from model.info import info_table, model_info

    read = DeepseekV3Config.from_json if path.is_file() else DeepseekV3Config.from_pretrained
    info = model_info(read(path))
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        from rich import print as rich_print

        rich_print(info_table(info))


def main() -> None:
    """Console script."""
    from grpo.cluster import RunFailure

    try:
        app(standalone_mode=True)
    except ValueError as err:
        _fail(err, 2)
    except RunFailure as err:
        _fail(err, 1)


def _fail(err: Exception, code: int) -> None:
    print(f"error: {' '.join(str(err).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
