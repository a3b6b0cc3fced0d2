"""Updates: what an adapter holds on a host. One file each; `LoraConfig.update` names them."""

from .affine import Affine as Affine
from .dora import DoRA as DoRA
from .features import Condition as Condition
from .features import encoder as encoder
from .features import repeats as repeats
from .low_rank import LowRank as LowRank
from .prompts import Prompts as Prompts
from .update import Change as Change
from .update import Pair as Pair
from .update import Start as Start
from .update import Update as Update
from .update import register as register
from .update import unregister as unregister
from .update import update_named as update_named
