"""The loop: build, resume, then step, log, evaluate and save until the steps are done.

config -> world -> model, optimizer, loader -> [train_step -> metrics -> evaluate -> checkpoint] * steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from mmpt import config as configuration
from mmpt.config import RunConfig
from mmpt.data.loader import Loader
from mmpt.model.convert import initialize_from
from mmpt.model.multimodal import MultimodalModel, parameter_counts
from mmpt.parallel.apply import apply_layout, splitter_of
from mmpt.parallel.mesh import World, join_world
from mmpt.parallel.sequence import refuse_unequal
from mmpt.train import checkpoint
from mmpt.train.evaluation import evaluate
from mmpt.train.machine import keep_freed_memory, make_repeatable
from mmpt.train.metrics import Clock, MetricsLog, Ticker
from mmpt.train.optimizer import make_optimizer
from mmpt.train.step import train_step
from mmpt.train.teacher import load_teacher
from mmpt.types import TrainState, UserError

SHOWN = 6  # figures of an evaluation


def train(config: RunConfig, runs: Path = Path("runs"), console: Console | None = None) -> Path:
    """Train runs/NAME to its last step, from its newest checkpoint if it has one. Returns the run's folder."""
    make_repeatable()
    keep_freed_memory()
    with join_world(config) as world:
        return _train(config, runs / config.name, world, console or Console())


def _train(config: RunConfig, run: Path, world: World, console: Console) -> Path:
    model = MultimodalModel(config.model).initialize(config.train.seed)
    published = [] if checkpoint.newest(run) else initialize_from(model, config.model)
    counts = parameter_counts(model)
    apply_layout(model.to(world.device), config.train, world)
    optimizer = make_optimizer(model, config.optimizer)
    state = begin_or_resume(run, model, optimizer, config, world)
    begun = state.loader if state else None
    loader = Loader(
        config,
        rank=world.data_rank,
        world_size=world.data_size,
        state=begun,
        finish=splitter_of(config.model, world),
        parts=world.sequence_size,
        bad_samples=run / "bad_samples" if world.leads else None,
    )
    teacher, taught_by = load_teacher(config, world, state.teacher if state else None)
    state = state or TrainState(step=0, loader=loader.state, samples=0, teacher=taught_by)
    with Ticker(console, config.train.steps, state.step, silent=not world.is_main) as ticker:
        for line in published:
            ticker.say(line)
        ranks = f"{world.size} rank(s){f' as {world.layout}' if world.size > 1 else ''}"
        ticker.say(f"{run}: {counts['total']:,} parameters, {ranks}, from step {state.step} of {config.train.steps}")
        _steps(config, run, world, Learner(model=model, optimizer=optimizer, teacher=teacher), loader, state, ticker)
    return run


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What a step changes, and what it learns from."""

    model: MultimodalModel
    optimizer: Optimizer
    teacher: MultimodalModel | None


def _steps(
    config: RunConfig,
    run: Path,
    world: World,
    learner: Learner,
    loader: Loader,
    state: TrainState,
    ticker: Ticker,
) -> None:
    """Take the steps that are left: log, evaluate and save as often as the config says, and at the end."""
    log = MetricsLog(run, state.step) if world.is_main else None
    clock = Clock(log.seconds_before if log else 0.0)
    batches, t, first = iter(loader), config.train, state.step
    model, optimizer = learner.model, learner.optimizer
    for step in range(state.step, t.steps):
        micro_batches = [batch.to(world.device) for batch in islice(batches, t.accumulate)]
        if len(micro_batches) < t.accumulate:  # on every rank alike
            ticker.say(f"the data ended after {state.step} steps: a source of the mixture is exhausted")
            break
        if world.sequence_group is not None:
            refuse_unequal(micro_batches, world.sequence_group)
        logged = (step + 1) % t.log_every == 0 or step + 1 == t.steps
        figures = train_step(model, optimizer, micro_batches, step, config, world, teacher=learner.teacher, detailed=logged)
        seen = state.samples + int(figures["documents"])
        state = replace(state, step=step + 1, loader=micro_batches[-1].state, samples=seen)
        clock.count(figures["documents"])
        ticker.step(state.step)
        refuse_idle(figures, config)
        if logged:
            counted = loader.meter.tokens if world.leads else {}
            tokens = {f"tokens/{source}": count for source, count in world.add_up(counted).items()}
            figures |= {"samples": state.samples, **clock.read(), **loader.meter.read(), **tokens, **loader.quarantine.figures}
            ticker.log(state.step, figures, clock.seconds_per_step * (t.steps - state.step))
        if log and logged:
            log.write("train", state.step, figures)
        if t.eval_every and state.step % t.eval_every == 0 and state.step < t.steps:
            with clock.paused():
                report_scores(evaluate(model, config, world), state.step, log, ticker)
        if state.step % t.checkpoint_every == 0 and state.step < t.steps:
            checkpoint.save(run, model, optimizer, state, config, world)
    if state.step > first:
        checkpoint.save(run, model, optimizer, state, config, world)  # first: a faulty held-out split must not cost the run
        report_scores(evaluate(model, config, world), state.step, log, ticker)
    if log:
        log.close()


def refuse_idle(figures: Mapping[str, float], config: RunConfig) -> None:
    """Raises UserError for a step in which no loss had anything to do: the run would only let its weights decay."""
    if not any(name.startswith("loss/") for name in figures):
        sees_all = config.model.transformer.mask == "bidirectional"
        mend = "; model.transformer.mask is bidirectional, so texts want task: masked in a mixture" if sees_all else ""
        raise UserError(
            f"data.spec = {config.data.spec}: there is nothing to learn in it for this run: no text to predict and no pair to "
            f"contrast under an objective whose weight is not 0{mend}"
        )


def report_scores(scores: Mapping[str, float], step: int, log: MetricsLog | None, ticker: Ticker) -> None:
    """Write down what an evaluation found, and show its main figures."""
    if log and scores:
        log.write("eval", step, scores)
        main = [f"{name} {value:.3f}" for name, value in scores.items() if "/val/" in f"/{name}" or name.endswith("R@1")]
        more = f"  and {len(main) - SHOWN} more in {log.path}" if len(main) > SHOWN else ""
        ticker.say(f"step {step}  {'  '.join(main[:SHOWN])}{more}")


def begin_or_resume(run: Path, model: nn.Module, optimizer: Optimizer, config: RunConfig, world: World) -> TrainState | None:
    """Load the newest checkpoint, if there is one, and write the config. Raises UserError for a run begun under another."""
    found = checkpoint.newest(run)
    state = checkpoint.restore(found, model, optimizer, config) if found else None
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(configuration.dump(config))
    world.barrier()
    return state
