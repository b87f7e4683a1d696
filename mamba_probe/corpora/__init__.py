"""Corpora: documents from files, folders and iterables, as rows of token ids that are packed or padded."""

from mamba_probe.corpora.layout import Batch, Corpus, corpus
from mamba_probe.corpora.reading import CONVERT, Document, check_known, n_unknown, token_ids

__all__ = ["CONVERT", "Batch", "Corpus", "Document", "check_known", "corpus", "n_unknown", "token_ids"]
