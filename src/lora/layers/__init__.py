"""Kinds of host: what a module becomes while adapters act on it, one file each; `kind.py` is their contract."""

from .attention import PromptAdapters as PromptAdapters
from .attention import attentions as attentions
from .attention import feature_readers as feature_readers
from .attention import set_rows as set_rows
from .host import Adapter as Adapter
from .host import LoraLayer as LoraLayer
from .host import adapters_of as adapters_of
from .host import base_modules as base_modules
from .kind import KINDS as KINDS
from .kind import Kind as Kind
from .kind import Line as Line
from .kind import Part as Part
from .kind import hosts as hosts
from .kind import kind_of as kind_of
from .kind import no_module as no_module
from .kind import register as register
from .kind import supported as supported
from .kind import unregister as unregister
from .left_out import tell_fresh as tell_fresh
from .left_out import tell_stacked as tell_stacked
from .readers import check_fast_path as check_fast_path
from .readers import never_called as never_called
from .unreached import Watch as Watch

from .whole import WholeAdapters as WholeAdapters  # isort: skip  (the table of kinds has the last one first)
from .embedding import EmbeddingAdapters as EmbeddingAdapters  # isort: skip
from .linear import LinearAdapters as LinearAdapters  # isort: skip
