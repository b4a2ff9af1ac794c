"""Tensors and parts of them as numpy arrays, as the safetensors library (0.8) returns them."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import numpy
    import torch

# numpy's names, which the library looks up too; bfloat16 exists once ml_dtypes is imported.
_NUMPY_NAMES = {"bool": "bool_", "complex64": "complex64"}


def as_numpy(tensor: torch.Tensor) -> numpy.ndarray[Any, Any]:
    """A view of the same memory. Raises TypeError or AttributeError for a dtype that numpy does not have."""
    import numpy
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        dtype = numpy.dtype(name)
    else:
        dtype = numpy.dtype(getattr(numpy, _NUMPY_NAMES.get(name, name)))
    flat = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else numpy.empty(0, numpy.uint8)
    return flat.view(dtype).reshape(tuple(tensor.shape))


def numpy_part(array: numpy.ndarray[Any, Any], index: Any) -> numpy.ndarray[Any, Any]:
    """A copy of `array[index]`, for the indexes that the library accepts.

    These are integers, slices that go forward within the tensor, and one ellipsis. Raises SafetensorError.
    """
    import numpy

    if isinstance(index, list) and index:
        raise SafetensorError(f"a list ({index!r}) cannot select from a tensor: use slices or integers")
    if isinstance(index, tuple):
        items = list(index)
    else:
        items = [slice(0, 0)] if isinstance(index, list) else [index]
    ellipses = sum(item is Ellipsis for item in items)
    if ellipses > 1 or len(items) - ellipses > array.ndim:
        raise SafetensorError(
            f"{index!r} does not fit a tensor of shape {list(array.shape)}: give at most one ellipsis, and "
            "at most one index for each dimension"
        )
    if ellipses:
        place = next(number for number, item in enumerate(items) if item is Ellipsis)
        items[place : place + 1] = [slice(None)] * (array.ndim - len(items) + 1)
    within = tuple(_checked(item, size, index) for item, size in zip(items, array.shape, strict=False))
    return numpy.array(array[within])


def _checked(item: Any, size: int, index: Any) -> int | slice:
    try:
        if not isinstance(item, slice):
            number = operator.index(item)
            if -size <= number < size:
                return number
        else:
            start = 0 if item.start is None else operator.index(item.start)
            stop = size if item.stop is None else operator.index(item.stop)
            step = 1 if item.step is None else operator.index(item.step)
            if 0 <= start <= stop <= size and start < size and step > 0:
                return slice(start, stop, step)
    except TypeError:
        pass
    raise SafetensorError(
        f"{item!r} in {index!r} does not select from a dimension of {size}: give an integer or a slice that "
        "goes forward within it, or open the file with framework='pt', which takes all that torch does"
    )
