"""Corpora: documents from files, folders and iterables, as rows of token ids that are packed or padded."""

from mamba_probe.corpora.layout import Batch, Corpus, corpus
from mamba_probe.corpora.reading import Document, token_ids

__all__ = ["Batch", "Corpus", "Document", "corpus", "token_ids"]
