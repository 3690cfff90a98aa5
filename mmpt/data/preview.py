"""The first documents of a split as the model sees them, in one HTML file that opens offline.

spec -> Corpus -> Document -> tokenize -> pictures, coloured tokens -> best_fit_decreasing -> rows coloured by document
"""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from torchvision.io import encode_png

from mmpt.config import ImageEncoderConfig
from mmpt.data.documents import to_document
from mmpt.data.index import Corpus
from mmpt.data.media import composite, decode_image
from mmpt.data.packing import best_fit_decreasing, tokenize
from mmpt.data.spec import load_spec
from mmpt.data.tokens import SPECIALS, Tokenizer
from mmpt.types import IGNORE, Document, Image, TokenizedDocument, UserError

DOCUMENTS = 48
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{style}</style>
<h1>{name}, split {split}</h1>
<p>The first {shown} of {documents} documents; {tokens_per_image} tokens a picture. A line of tokens is a segment:
no token sees another segment.</p>
<p>{legend}</p>
<h2>Packs of {pack_tokens} tokens, a colour for each document</h2>
{rows}
<h2>Documents</h2>
{articles}
</html>
"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
article { border-top: 1px solid #ddd; padding: .8rem 0; overflow-wrap: anywhere }
article h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .4rem; color: #666 }
article img { width: 64px; height: 64px; border: 1px solid #ddd; margin-right: .4rem }
p.segment { margin: .3rem 0; line-height: 1.9 }
.t { padding: .1rem .2rem; border-radius: .2rem; margin-right: 1px; white-space: pre-wrap; font-family: ui-monospace, monospace }
.predicted { background: #d8f0dc } .given { background: #e9e9ee } .special { background: #f7e3c4 }
.image { background: #cfe0f7 } .emb { background: #f3cfe6 }
.row { display: flex; height: 1.5rem; margin: .25rem 0; background: #f2f2f2; overflow: hidden }
.row span { border-right: 1px solid #fff; font-size: .65rem; line-height: 1.5rem; overflow: hidden; text-align: center }
"""
LEGEND = {
    "predicted": "text, predicted",
    "given": "text, given",
    "special": "begin and end",
    "image": "slots of a picture",
    "emb": "embedding",
}


def preview(
    spec: str | Path, tokenizer: str | Path, out: str | Path, split: str, image: ImageEncoderConfig, pack_tokens: int
) -> Path:
    """Write the first documents of a split to `out`, pictures and packs in the sizes given. Returns its path.

    Raises UserError for a spec or a tokenizer that does not load, and for a faulty document.
    """
    corpus, words = Corpus.open(load_spec(spec), split), Tokenizer.load(tokenizer)
    shown, lengths = [], []
    for number in range(min(DOCUMENTS, len(corpus))):
        sample = corpus.read(number)
        try:
            document = to_document(sample, corpus.name)
            segments = tokenize(document, words, image.tokens_per_image)
            shown.append(_article(number, document, segments, words, image.size))
        except ValueError as error:
            raise UserError(f"{corpus.name}: document {sample.key} of {sample.shard}: {error}") from error
        lengths.append(sum(len(segment.tokens) for segment in segments))
    pack_tokens = max([pack_tokens, *lengths])
    page = PAGE.format(
        name=escape(corpus.name),
        style=STYLE,
        split=escape(split),
        shown=len(shown),
        documents=f"{len(corpus):,}",
        tokens_per_image=image.tokens_per_image,
        pack_tokens=pack_tokens,
        legend=" ".join(f'<span class="t {kind}">{text}</span>' for kind, text in LEGEND.items()),
        rows=_rows(lengths, pack_tokens),
        articles="".join(shown),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _article(number: int, document: Document, segments: list[TokenizedDocument], words: Tokenizer, size: int) -> str:
    pictures = "".join(_picture(part, size) for part in document.parts if isinstance(part, Image))
    lines = "".join(f'<p class="segment">{_tokens(segment, words)}</p>' for segment in segments)
    return f"<article><h3>{number} · {escape(document.key)}</h3>{pictures}{lines}</article>"


def _picture(image: Image, size: int) -> str:
    """Decoded and encoded anew: a stranger's bytes never reach the page."""
    png = encode_png(composite(decode_image(image.data, size)[None])[0]).numpy().tobytes()
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _tokens(segment: TokenizedDocument, words: Tokenizer) -> str:
    """The tokens of a segment; the slots of a picture stand together."""
    predicted = {position + 1 for position, label in enumerate(segment.labels) if label != IGNORE}
    special = {words.inner.token_to_id(name): name for name in SPECIALS}
    starts = {span.start: span.length for span in segment.media}
    spans = []
    for position, token in enumerate(segment.tokens):
        if token == words.image:
            if position in starts:
                spans.append(("image", f"<image> × {starts[position]}"))
        elif token in special:
            kind = "emb" if token == words.emb else "predicted" if position in predicted else "special"
            spans.append((kind, special[token]))
        else:
            spans.append(("predicted" if position in predicted else "given", words.decode([token])))
    return "".join(f'<span class="t {kind}">{escape(text)}</span>' for kind, text in spans)


def _rows(lengths: list[int], pack_tokens: int) -> str:
    """A bar a pack, a colour a document, as wide as it is long; what stays grey is padding."""
    rows = []
    for pack in best_fit_decreasing(lengths, pack_tokens):
        parts = (
            f'<span title="document {d}: {lengths[d]} tokens" style="width:{100 * lengths[d] / pack_tokens:.2f}%;'
            f'background:hsl({d * 137 % 360} 60% 78%)">{d}</span>'
            for d in pack
        )
        rows.append(f'<div class="row">{"".join(parts)}</div>')
    return "".join(rows)
