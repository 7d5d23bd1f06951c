"""Language, sentences and words of a text, as IFEval counts them: by langdetect, and by NLTK's Punkt for English."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_text
from nemotron_h.data.blend import Fetch
from nemotron_h.data.prepare.fetch import fetch

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

#: NLTK's punkt_tab for English, which NLTK would download on first use; Apache-2.0
_PUNKT = Fetch(
    package="llama-index-core==0.14.25",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    members=["llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/*"],
)
#: ours: langdetect draws; with a seed a text is always of the same language
_SEED = 0


def is_in(text: str, language: str) -> bool:
    """Return True if a text is in a language (its code of ISO 639-1), or nothing in it tells."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = _SEED
    try:
        return detect(text) == language
    except LangDetectException:
        return True


def sentences(text: str) -> list[str]:
    """Return the sentences of an English text."""
    return _punkt().tokenize(text)


def words(text: str) -> list[str]:
    """Return the words and signs of an English text."""
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [word for sentence in sentences(text) for word in tokenizer.tokenize(sentence)]


@functools.cache
def _punkt() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    try:
        lines = {Path(name).name: read_text(file).splitlines() for name, file in fetch(_PUNKT)}
    except UserError as error:
        hint = "\n".join(filter(None, (error.hint, "without it sentences cannot be counted: move ifeval's files away")))
        raise UserError(error.message, hint=hint) from error
    parameters = PunktParameters()
    parameters.abbrev_types.update(lines["abbrev_types.txt"])
    parameters.sent_starters.update(lines["sent_starters.txt"])
    parameters.collocations.update(tuple(line.split("\t")) for line in lines["collocations.tab"])
    parameters.ortho_context.update(
        (word, int(flags)) for word, _, flags in (line.rpartition("\t") for line in lines["ortho_context.tab"])
    )
    return PunktSentenceTokenizer(parameters)
