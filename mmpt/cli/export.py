"""The command that writes a run's model in the form in which another library opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from mmpt.config import RunConfig
    from mmpt.data.tokens import Tokenizer

Target = Literal["hf", "open_clip", "safetensors"]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder: runs/NAME")],
    to: Annotated[Target, typer.Option(help="hf: a Llama, Mixtral or BERT; open_clip: a CLIP; safetensors: any model.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder that is not there yet; by default RUN/export/TO-STEP.")
    ] = None,
) -> None:
    """Write a run's model for another library.

    Takes the newest checkpoint. The folder opens with transformers' from_pretrained(FOLDER), or with open_clip's
    create_model_and_transforms('local-dir:FOLDER'); --to safetensors writes mmpt's own names.
    """
    from mmpt.data.tokens import Tokenizer
    from mmpt.model.convert import write_checkpoint
    from mmpt.train.checkpoint import load_model
    from mmpt.types import UserError

    model, config, step = load_model(run)
    tokenizer = Tokenizer.of(config.data)
    folder = out or run / "export" / f"{to}-{step:08d}"
    if folder.exists():
        raise UserError(f"{folder}: is there already; remove it, or give another folder with --out")
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_checkpoint(model, config.model, to, aside, _facts(to, config, tokenizer))
        _write_tokenizer(to, config, tokenizer, aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    typer.echo(folder)


def _facts(to: Target, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the library wants to know beside the architecture: which tokens mean what, and how long a text may be."""
    from mmpt.data.tokens import OpenClipTokenizer

    if to == "hf":
        facts = {"pad_token_id": tokenizer.pad, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        c = config.model.transformer
        if c.positions == "rotary":  # how far the weights were trained, or stretched
            stretched = round(c.rope_scaling.factor * c.rope_scaling.original_positions) if c.rope_scaling else 0
            facts["max_position_embeddings"] = max(config.data.pack_tokens, stretched)
        return facts
    if to == "open_clip" and isinstance(tokenizer, OpenClipTokenizer):
        return tokenizer_settings(tokenizer.model)
    if to == "open_clip":
        return {"hf_tokenizer_name": "tokenizer.json", "pool_type": "eos", "eos_id": tokenizer.emb, "pad_id": tokenizer.pad}
    return {}


def tokenizer_settings(name: str) -> dict[str, Any]:
    """How open_clip makes the tokenizer of one of its models: CLIP's own cleans texts in several ways."""
    import open_clip

    text = open_clip.get_model_config(name)["text_cfg"]
    return {key: text[key] for key in ("tokenizer_kwargs",) if key in text}


def _write_tokenizer(to: Target, config: RunConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and how its special tokens are spelled; nothing where open_clip has the tokenizer itself."""
    from tokenizers import processors

    from mmpt.data.tokens import OpenClipTokenizer

    if isinstance(tokenizer, OpenClipTokenizer):
        if to != "open_clip":
            typer.echo(f"without a tokenizer.json: texts go through open_clip.get_tokenizer({tokenizer.model!r})")
        return
    names, is_bert = tokenizer.names, config.model.head == "bert"
    # A text as it stands in a pack: a CLIP's <bos> words <emb>, a BERT's <bos> words <eos>; a Llama says itself how it goes on.
    end = names.emb if to == "open_clip" else names.eos if is_bert else None
    row = f"{names.bos} $A" + (f" {end}" if end else "")
    ids = {name: tokenizer.inner.token_to_id(name) for name in {names.bos, names.eos, end} - {None}}
    tokenizer.inner.post_processor = processors.TemplateProcessing(
        single=row, pair=f"{row} $B:1 {names.eos}:1" if is_bert else None, special_tokens=list(ids.items())
    )
    tokenizer.save(folder / "tokenizer.json")
    spelled = {"pad_token": names.pad, "bos_token": names.bos, "eos_token": names.eos}
    if is_bert:
        spelled |= {"cls_token": names.bos, "sep_token": names.eos}
    if tokenizer.mask is not None:
        spelled["mask_token"] = names.mask
    inputs = ["input_ids", *(["token_type_ids"] if is_bert else []), "attention_mask"]
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **spelled}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain, indent=2) + "\n")
