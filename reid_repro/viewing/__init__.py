"""Pictures: ranked lists, curves, diagrams, and what a network looked at.

Trained methods and the explorer, which use them, are in `reid_repro.lab`.

Every public name of the room's modules can be imported from here; a module is loaded when a name
of it is first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
