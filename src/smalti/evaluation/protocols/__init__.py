"""One file per protocol, with its settings. Importing this package registers all of them, in alphabetical order."""

import importlib
import pkgutil

for _module in sorted(pkgutil.iter_modules(__path__, f"{__name__}."), key=lambda module: module.name):
    importlib.import_module(_module.name)
