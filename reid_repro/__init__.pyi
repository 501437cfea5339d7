from .can import CAN as CAN
from .casn import CASN as CASN
from .datasets.core import load_images as load_images
from .datasets.registry import open_benchmark as open_benchmark
from .dcc import DCC as DCC
from .evaluation.reranking import rerank as rerank
from .evaluation.scores import distance_matrix as distance_matrix
from .evaluation.scores import evaluate as evaluate
from .ianet import IABlock as IABlock
from .ianet import IANet as IANet
from .ide import IDE as IDE
from .lab.methods import from_checkpoint as from_checkpoint
from .learning.recipe import Recipe as Recipe
from .learning.training import embed as embed
from .learning.training import train as train
from .minet import MINet as MINet
from .pcb import PCB as PCB

__version__: str
