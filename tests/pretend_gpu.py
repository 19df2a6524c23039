"""A GPU that does not exist: finds the operations for which the CPU would wait for a real one.

    with PretendGpu() as gpu:
        model = gpu.move(model)
        loss(model, tokens.to("cuda", non_blocking=True)).backward()
    assert gpu.waits == []

Its tensors say that they are on cuda:0; their values are on the CPU, which computes everything. So
all code takes the way it takes on a GPU, with the same numbers. The CPU waits for a GPU where it
needs a value (`.item()`), where a shape depends on values (`nonzero`, a mask as an index), and
where it copies between the two, unless it copies pinned memory to the GPU with non_blocking.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from minisft.model import packed_attention
from minisft.model.attention import attend

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
# Operations whose result, or the shape of whose result, the CPU needs.
NEEDS_VALUES = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
# torch with CUDA has kernels for these on a GPU only, so the CPU computes them in parts.
IN_PARTS = get_decompositions([aten._fused_rms_norm, aten._fused_rms_norm_backward])
# Operations that only describe a tensor anew.
NO_KERNEL = {
    aten._unsafe_view,
    aten.detach,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
}
CUDA = torch.device("cuda", 0)


class GpuTensor(torch.Tensor):
    """A tensor that says that it is on cuda:0. on_cpu: its values."""

    @staticmethod
    def __new__(cls, on_cpu):
        # A tensor without values. torch's C++ code sees the device meta, which needs no driver.
        with _disable_current_modes():
            size, stride = on_cpu.shape, on_cpu.stride()
            like = torch.empty_strided(size, stride, dtype=on_cpu.dtype, device="meta")
            return torch.Tensor._make_subclass(cls, like, False, device_for_backend_keys=CUDA)

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self):
        return f"GpuTensor{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: a tensor of a PretendGpu is used after its end")


class PretendGpu(TorchDispatchMode):
    """waits: "file:line operation" of each. kernels: how often each operation ran on the GPU."""

    def __init__(self):
        super().__init__()
        self.waits, self.kernels, self.pinned = [], Counter(), {}
        self._patched = pytest.MonkeyPatch()

    def __enter__(self):
        self._patched.setattr(torch.cuda, "is_available", lambda: True)
        self._patched.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        self._patched.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        self._patched.setattr(torch.cuda, "_lazy_init", lambda: None)
        self._patched.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        tolist = torch.Tensor.tolist  # which refuses tensors of a subclass
        self._patched.setattr(torch.Tensor, "tolist", lambda tensor: tolist(tensor.cpu()))
        # Checkpointing saves the random state of the GPU.
        self._patched.setattr(torch.utils.checkpoint, "get_device_states", lambda *_: ([], []))
        self._patched.setattr(packed_attention, "varlen_kernel", lambda: varlen_attn)
        # Lists of plain tensors on a GPU take one kernel (torch._foreach_...).
        self._patched.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True)
        # An optimizer asks a real GPU whether it captures a graph.
        check = "_accelerator_graph_capture_health_check"
        self._patched.setattr(torch.optim.Optimizer, check, lambda _: None, raising=False)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") becomes a copy
        return super().__enter__()

    def __exit__(self, *details):
        torch._C._set_only_lift_cpu_tensors(False)
        self._patched.undo()
        return super().__exit__(*details)

    def move(self, model):
        """The model with its parameters and buffers on the GPU. In place; tied ones stay tied."""
        moved = {}

        def on_gpu(tensor):
            if id(tensor) not in moved:
                copy = GpuTensor(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    copy = nn.Parameter(copy, tensor.requires_grad)
                moved[id(tensor)] = (copy, tensor)  # keep both: ids are unique among the living
            return moved[id(tensor)][0]

        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = None if tensor is None else on_gpu(tensor)
        return model

    def _pin(self, tensor):
        copy = tensor.clone()
        self.pinned[id(copy)] = copy
        return copy

    def _wait(self, func):
        frames = traceback.extract_stack()
        ours = [
            frame
            for frame in frames
            if Path(frame.filename).is_relative_to(ROOT)
            and not Path(frame.filename).is_relative_to(ROOT / "tests")
            and ".venv" not in frame.filename
        ]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "backward"
        self.waits.append(f"{where} {func}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = tree_flatten((args, kwargs))[0]
        given = [value for value in flat if isinstance(value, torch.Tensor)]
        inputs_on_gpu = [isinstance(value, GpuTensor) for value in given]
        is_on_gpu = any(inputs_on_gpu)
        packet = func.overloadpacket
        if packet is aten._fused_sdp_choice and is_on_gpu:
            return 0  # the plain attention
        if packet is aten.is_pinned:
            return id(args[0]) in self.pinned
        # In inference mode, torch shows composite operations before it divides them.
        if func in IN_PARTS or func._can_decompose():
            _push_mode(self)
            try:
                return IN_PARTS.get(func, func.decompose)(*args, **kwargs)
            finally:
                _pop_mode()
        device = kwargs.get("device")
        target = is_on_gpu if device is None else torch.device(device).type != "cpu"
        if device is not None:
            kwargs["device"] = torch.device("cpu")

        if packet is aten._to_copy and target != is_on_gpu:
            is_free = target and kwargs.get("non_blocking") and id(args[0]) in self.pinned
            if not is_free:
                self._wait(func)
        elif packet is aten.copy_ and inputs_on_gpu[0] != inputs_on_gpu[1]:
            # A number goes to the GPU as an argument of the kernel.
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            is_asynchronous = non_blocking and id(args[1]) in self.pinned
            is_free = inputs_on_gpu[0] and (is_asynchronous or args[1].dim() == 0)
            if not is_free:
                self._wait(func)
        elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            indices = [index for index in args[1] if index is not None]
            if is_on_gpu and any(
                index.dtype in (torch.bool, torch.uint8) or not isinstance(index, GpuTensor)
                for index in indices
            ):
                self._wait(func)
        elif packet in NEEDS_VALUES and is_on_gpu:
            if packet is not aten.repeat_interleave or kwargs.get("output_size") is None:
                self._wait(func)
        if is_on_gpu and not func.is_view and packet not in NO_KERNEL:
            self.kernels[str(packet)] += 1

        values, options = tree_map_only(GpuTensor, lambda value: value.on_cpu, (args, kwargs))
        result = func(*values, **options)
        # An operation in place returns its argument.
        known = {id(value.on_cpu): value for value in given if isinstance(value, GpuTensor)}

        def wrapped(value):
            if not isinstance(value, torch.Tensor) or not target:
                return value
            return known[id(value)] if id(value) in known else GpuTensor(value)

        return tree_map(wrapped, result)


def varlen_attn(q, k, v, bounds, _, longest, __, window_size):
    """torch's kernel for rows of different lengths, by a mask: q (T, H, d), k and v (T, K, d)."""
    place = torch.arange(len(q), device=q.device)
    row = torch.searchsorted(bounds, place, right=True)
    distance = place[:, None] - place
    mask = (row[:, None] == row) & (distance >= 0)
    if window_size[0] >= 0:
        mask = mask & (distance <= window_size[0])
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return attend(q, k, v, mask)[0].transpose(0, 1)
