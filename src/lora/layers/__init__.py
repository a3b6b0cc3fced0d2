"""What takes a module's place: thin classes that choose the operation."""

from .host import Adapter as Adapter
from .host import Adapters as Adapters
from .host import LoraLayer as LoraLayer
from .linear import LinearAdapters as LinearAdapters
from .linear import LoraLinear as LoraLinear
from .linear import LowRank as LowRank
from .whole import Whole as Whole
from .whole import WholeAdapters as WholeAdapters
from .whole import WholeLayer as WholeLayer
