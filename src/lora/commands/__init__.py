"""The commands, as one typer app. Modules here import torch and transformers inside their functions only."""

from typing import Annotated

import typer

from .. import __version__
from .chat import chat
from .data import app as data
from .doctor import doctor
from .estimate import estimate
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .merge import merge
from .recipes import recipes
from .settings import RecipeCommand
