"""The demo's private data: eight owners over four domains, built from what the running environment carries."""

from lorafleet.demo.corpora.build import Corpora, Domain, File, Owner, build_corpora

__all__ = ["Corpora", "Domain", "File", "Owner", "build_corpora"]
