"""Model and optimizer as full tensors by parameter name, whatever wraps the model and over however many processes it is spread.

Names are those of the model itself: what DDP and torch.compile put in front is taken off. A weight that is tied is there once,
under its first name. DTensors (FSDP2) are gathered on the way out, which all processes take part in, and cut on the way in, which
each does by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.errors import GristmillError

if TYPE_CHECKING:
    import torch

COMPILED = "_orig_mod"


def full_model_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of `model` by name; in processes other than the first, nothing.

    Tensors that are not spread over processes are the model's own, not copies: they change when it does.
    """
    return _gathered(_named_tensors(model))


def full_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors by ``<parameter name>/<state name>``, as `full_model_state` does those of the model.

    Raises:
        GristmillError: the optimizer holds something that is no tensor, or is of a parameter that `model` has not.
    """
    import torch

    names = {id(parameter): name for name, parameter in _named_tensors(model).items()}
    state = {}
    for parameter, entry in optimizer.state.items():
        for field, value in entry.items():
            name = names.get(id(parameter))
            if name is None or not isinstance(value, torch.Tensor):
                raise GristmillError(
                    f"{type(optimizer).__name__} holds {field!r} ({type(value).__name__}) of {name or 'a foreign parameter'}; "
                    "checkpoints hold tensors of the model's parameters, keep it as one in optimizer.state"
                )
            state[f"{name}/{field}"] = value
    return _gathered(dict(sorted(state.items())))


def load_model_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state`, as `full_model_state` returns it, into `model`.

    Raises:
        GristmillError: a tensor is missing, unknown or of another shape.
    """
    import torch

    own = _named_tensors(model)
    _check_names("model", own, state)
    with torch.no_grad():
        for name, tensor in own.items():
            _check_shape(name, tensor, state[name])
            tensor.copy_(_like(state[name], tensor))


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, torch.Tensor]) -> None:
    """Put `state`, as `full_optimizer_state` returns it, back into `optimizer`, each tensor where its parameter is.

    Raises:
        GristmillError: a tensor is of a parameter that `model` has not.
    """
    parameters = _named_tensors(model)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in state.items():
        name, _, field = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in groups:
            raise GristmillError(
                f"optimizer state {key!r}: no such parameter is trained; it is of another model, remove it and train again"
            )
        if field == "step":  # torch keeps it on the CPU unless a kernel of the device counts
            group = groups[id(parameter)]
            on_device = group.get("fused") or group.get("capturable")
            optimizer.state[parameter][field] = value.to(parameter.device if on_device else "cpu", copy=True)
        else:
            optimizer.state[parameter][field] = _like(value, parameter, copy=True)


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by their name in the model itself; one that has several names by the first."""
    import torch

    while isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    seen: set[int] = set()
    found = {}
    # The state dict rather than named_parameters: of a model that FSDP2 has gathered, only it gives the parts.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[".".join(part for part in name.split(".") if part != COMPILED)] = tensor
    return found


def _gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch
    from torch.distributed.tensor import DTensor

    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
            whole = whole.cpu() if first else whole
        if first:
            found[name] = whole.contiguous()
        del whole  # the next one is gathered into the memory of this one
    return found


def _like(value: torch.Tensor, parameter: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
    """Return `value` on the device of `parameter`, spread as it is where it has its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device, copy=copy)
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # every process has all of it


def _check_names(kind: str, own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise GristmillError(
            f"{kind} state does not fit: {len(missing)} tensors are missing {missing[:3]}, {len(unknown)} are unknown {unknown[:3]}; "
            "it is of another model, remove it and train again"
        )


def _check_shape(name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.shape != value.shape:
        raise GristmillError(
            f"model state {name} has shape {tuple(value.shape)}, the model's is {tuple(tensor.shape)}; it is of another model, "
            "remove it and train again"
        )
