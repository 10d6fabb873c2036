"""The `v4` command: reads the config, then starts the work as subprocesses."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launch import processes
from launch.arguments import Config, Overrides, Overwrite, check, run_command
from launch.choices import Effort, GpuName, WeightFormat
from launch.data_commands import data_app

if TYPE_CHECKING:
    pass

# pydantic's models, rich and optuna are imported where they are used: `--help` needs none of them.

app = typer.Typer(
    help="Pre-training of the DeepSeek-V4 architecture, from raw text to a transformers model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
tokenizer_app = typer.Typer(help="The tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
kernels_app = typer.Typer(help="The kernels of this machine's GPUs.", no_args_is_help=True)
app.add_typer(kernels_app, name="kernels")

Processes = Annotated[
    int, typer.Option(min=1, help="Processes that share the model, each with some of its weights.")
]


def _path(text: str | Path) -> Path:
    """Parses an option, in which no shell replaces `~`."""
    return Path(os.path.expanduser(text))


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


@tokenizer_app.command("train")
def tokenizer_train(
    config: Config, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Train the tokenizer of data.tokenizer on data.sources."""
    run_command("tokenizer-train", config, overrides, *["--overwrite"] * overwrite)


@kernels_app.command("check")
def kernels_check(
    config: Annotated[
        str,
        typer.Argument(help="Config file or run folder, for the sizes; by default nano.yaml's."),
    ] = str(CONFIGS / "nano.yaml"),
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes of the run, for fit_to_memory; by default the minimum."
        ),
    ] = None,
) -> None:
    """Check every kernel on this machine's GPUs: does it fit, is it right, is it faster."""
    more = [] if nproc is None else [f"--processes={nproc}"]
    run_command("kernels-check", config, overrides, *more)


@kernels_app.command("show")
def kernels_show() -> None:
    """Show the checks of this user, and what each GPU uses."""
    _exit(processes.run(processes.command("kernels-show")))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc_per_node: Annotated[
        int, typer.Option(min=1, help="Processes on this machine (torchrun when more than one).")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts after a crash, from the newest checkpoint.")
    ] = 0,
) -> None:
    """Train, or resume from the newest checkpoint. SIGTERM or Ctrl-C: checkpoint, then exit."""
    check(config, overrides).check_world(nproc_per_node)
    _exit(processes.train([config, *(overrides or [])], nproc_per_node, max_restarts))


@app.command("eval")
def evaluate(
    config: Annotated[
        str, typer.Argument(help="Run folder, config file, or a Hugging Face folder for --tasks.")
    ],
    overrides: Overrides = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Instead of the loss: tasks of lm-eval, by name or .yaml file."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first questions of each task.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question.")
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin every text of a task with bos.")
    ] = False,
    task_code: Annotated[
        bool, typer.Option("--task-code", help="Let task files run your own Python code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Loss of the newest checkpoint on the validation text, or scores in tasks of lm-eval."""
    from trainer.config import ConfigError, is_hf_folder

    numbers = {"limit": limit, "fewshot": fewshot}
    options = [f"--{name}={value}" for name, value in numbers.items() if value is not None]
    options += ["--bos"] * bos + ["--task-code"] * task_code
    if tasks is None and options:
        raise ConfigError(f"v4 eval: {options[0].partition('=')[0]} is of tasks; name --tasks")
    options += ["--json"] * as_json + ([] if tasks is None else [f"--tasks={tasks}"])
    if is_hf_folder(config):
        _exit(processes.run(processes.command("eval", config, *options, *(overrides or []))))
    run_command("eval", config, overrides, *options)


@app.command()
def export(
    config: Annotated[
        str, typer.Argument(help="Config file or run folder; with --check an exported folder.")
    ],
    out: Annotated[
        str | None, typer.Argument(help="New folder, or a URL such as s3://bucket/model.")
    ] = None,
    overrides: Overrides = None,
    weights: Annotated[
        WeightFormat,
        typer.Option(
            help="mxfp4_experts packs the routed experts in MXFP4; released also writes linears in "
            "FP8 and the rest in bf16, as the official release."
        ),
    ] = WeightFormat.AS_TRAINED,
    prompts: Annotated[
        str | None,
        typer.Option(help="Encoder of a released folder; the chat template gets its prompt texts."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check instead that vLLM and SGLang find all that they read."),
    ] = False,
) -> None:
    """Write the newest checkpoint as a Hugging Face folder, or check such a folder."""
    if check:
        if out is not None:
            raise typer.BadParameter("it takes one folder", param_hint="--check")
        _exit(processes.run(processes.command("check-export", config)))
    if out is None:
        raise typer.BadParameter("name the new folder", param_hint="OUT")
    more = [f"--weights={weights.value}", *([] if prompts is None else [f"--prompts={prompts}"])]
    run_command("export", config, overrides, out, *more)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Run folder, or Hugging Face folder.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="By default standard input is the prompt."),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="File with a prompt on each line; - is standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Draw from the fewest tokens that make up this.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A token that ends a text, as eos does.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    speculation: Annotated[
        bool, typer.Option(help="Draft with the MTP block; the texts are distributed as without.")
    ] = True,
    packed: Annotated[
        bool, typer.Option("--packed", help="Cache in FP8 and MXFP4, for models trained with it.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each prompt.")
    ] = False,
    nproc: Processes = 1,
) -> None:
    """Continue prompts with the newest checkpoint of a run, or a Hugging Face folder."""
    numbers = {"max-new-tokens": max_new_tokens, "temperature": temperature, "top-p": top_p}
    options = [f"--{name}={value}" for name, value in {**numbers, "seed": seed}.items()]
    options += [f"--stop={token}" for token in stop or []]
    options += [] if file is None else [f"--file={file}"]
    options += ["--no-speculation"] * (not speculation) + ["--packed"] * packed
    options += ["--json"] * as_json
    options += [f"--prompt={prompt}" for prompt in prompts or []]
    _exit(processes.run_together(nproc, "generate", folder, *options))


@app.command()
def chat(
    folder: Annotated[str, typer.Argument(help="Run folder, or Hugging Face folder.")],
    think: Annotated[Effort, typer.Option(help="How much the model reasons first.")] = Effort.NONE,
    system: Annotated[str | None, typer.Option(help="Text of the system message.")] = None,
    tools: Annotated[
        str | None, typer.Option(help="JSON file with a list of tools that may be called.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Encoder of a released folder, whose prompt texts are then used."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Draw from the fewest tokens that make up this.")
    ] = 1.0,
    nproc: Processes = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of sampling; by default a random one.")
    ] = None,
) -> None:
    """Talk to a model: each line is a turn. An empty line, or the end of the input, ends it."""
    numbers = {"max-new-tokens": max_new_tokens, "temperature": temperature, "top-p": top_p}
    texts = {"system": system, "tools": tools, "prompts": prompts, "seed": seed}
    options = [f"--{name}={value}" for name, value in {**numbers, "think": think.value}.items()]
    options += [f"--{name}={text}" for name, text in texts.items() if text is not None]
    _exit(processes.run_together(nproc, "chat", folder, *options))


@app.command("import")
def import_(source: str, config: Config, overrides: Overrides = None) -> None:
    """Start a run from a Hugging Face folder; CONFIG gives all but the model's sizes."""
    _exit(processes.run(processes.command("import", config, source, *(overrides or []))))


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Draw the run's curves, or the comparison of a sweep's trials, into report.html."""
    if (Path(config) / "sweep.json").is_file():
        _exit(processes.run(processes.command("sweep-report", config)))
    run_command("report", config, overrides)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes in total; by default the minimum."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Memory with activations, nothing allocated.")
    ] = False,
    phase: Annotated[
        int | None,
        typer.Option(min=0, help="Phase for --dry-run; by default the one with most memory."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one layer of each kind on this machine.")
    ] = False,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="The optimizer's table of all parameters.")
    ] = False,
    efficiency: Annotated[
        bool,
        typer.Option(
            "--efficiency",
            help="Instead: operations and cache of a token at inference, against its context.",
        ),
    ] = False,
    gpu: Annotated[
        GpuName | None, typer.Option(help="With --efficiency: the decoding rate of this GPU.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="PATH", help="With --efficiency: a picture, PNG."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Also write a job: a cluster file, or slurm or kubernetes for the one in "
            "configs/clusters."
        ),
    ] = None,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="N", help="Nodes of the job; MIN:MAX runs on as many of them as there are."
        ),
    ] = "1",
    gpus_per_node: Annotated[
        int,
        typer.Option(min=0, help="GPUs, each with a process, on a node; 0: one on its CPUs."),
    ] = 8,
    out: Annotated[
        Path, typer.Option(parser=_path, metavar="PATH", help="Folder for the job file.")
    ] = Path("job"),
) -> None:
    """Show steps, tokens, parameters, traffic and memory of a config; write a cluster's job."""
    run = check(config, overrides)
    if cluster is not None:
        from launch.cluster import load_cluster, write_job
        from launch.job import Nodes

        arguments = [config, *(overrides or [])]
        of_job = Nodes.parse(nodes)
        nproc = of_job.low * max(gpus_per_node, 1)  # where a process needs the most memory
        path = write_job(run, arguments, load_cluster(cluster), of_job, gpus_per_node, out)
        submit = "sbatch" if path.suffix == ".sbatch" else "kubectl apply -f"
        print(f"wrote {path}; submit it with: {submit} {path}", flush=True)
    nproc = nproc or run.min_world
    run.check_world(nproc)
    flags = ["--dry-run"] * dry_run + ["--measure"] * measure + ["--parameters"] * parameters
    flags += [] if phase is None else [f"--phase={phase}"]
    flags += ["--efficiency"] * efficiency + ([] if gpu is None else [f"--gpu={gpu.value}"])
    flags += [] if plot is None else [f"--plot={plot}"]
    command = processes.command("plan", config, *(overrides or []), f"--processes={nproc}", *flags)
    _exit(processes.run(command))


@app.command("config")
def config_reference(
    section: Annotated[
        str | None, typer.Argument(help="Section or field, such as optim.muon; by default a list.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Show the fields with this in their name or meaning.")
    ] = None,
) -> None:
    """Show the fields of the config: types, defaults, units, meanings and checks."""
    from launch.show_config import show

    show(section, search)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="Sweep file in wandb's format.")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="PATH", help="Folder of the trials; by default runs/sweep-NAME."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Concurrent trials.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random trials.")] = 0,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Only write an array of --jobs jobs that share the trials: a cluster file of "
            "kind slurm, or slurm for the one in configs/clusters."
        ),
    ] = None,
    wandb_agent: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="With --cluster: the jobs are wandb's agents of this sweep."
        ),
    ] = None,
    call: Annotated[
        str | None,
        typer.Option(help="Common name of processes that share the trials, as --cluster sets it."),
    ] = None,
) -> None:
    """Run a sweep on this machine, or resume one that was stopped."""
    from launch.sweep import run_sweep
    from launch.sweep_job import write_array

    if cluster is None and wandb_agent is None:
        _exit(run_sweep(file, out, jobs, seed, call))
    path = write_array(file, out, jobs, seed, cluster or "slurm", wandb_agent)
    print(f"wrote {path}; submit it with: sbatch {path}", flush=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(parser=_path, metavar="PATH", help="Output folder.")] = Path(
        "runs/demo"
    ),
    nproc_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; by default 2, or 1 where there is one GPU."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """The whole pipeline on text from this machine: corpus to transformers model."""
    from launch.demo import run_demo

    _exit(run_demo(out, nproc_per_node, overrides or []))


def main() -> None:
    """Runs the command line: errors of the user or the machine are one line and exit code 2."""
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        from trainer.process.errors import report_error

        sys.exit(report_error(error))
