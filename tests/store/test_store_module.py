"""What save_module promises: each distinct parameter once, bit for bit, found again by its contents."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from store_helpers import cached_share, entries, files_of, skip_unless_the_cache_can_be_dropped
from torch import nn

import zinfer.store.module
import zinfer.store.safetensors_writer
from zinfer.errors import OptionError, StoreError
from zinfer.store import save_module, verify
from zinfer.store.safetensors_writer import DTYPE_NAMES
from zinfer.weights.checkpoint import open_checkpoint


class Holder(nn.Module):
    """A module of the given parameters."""

    def __init__(self, **parameters):
        super().__init__()
        for name, tensor in parameters.items():
            is_parameter = isinstance(tensor, nn.Parameter)
            self.register_parameter(
                name,
                tensor if is_parameter else nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
            )


def save(module, drive):
    return save_module(module, str(drive), progress=False)


def load(entry):
    return {name: t for shard in open_checkpoint(entry).shards for name, t in load_file(shard).items()}


def test_every_parameter_comes_back_bit_for_bit(tmp_path):
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Embedding(4, 5)).to(torch.bfloat16)
    entry, stored = save(module, tmp_path)
    loaded = load(entry)
    assert stored == {name: name for name, _ in module.named_parameters()}
    assert all(torch.equal(loaded[name], parameter) for name, parameter in module.named_parameters())
    assert files_of(entry).keys() == {"manifest.json", "model.safetensors"}
    verify(entry)


def test_transformers_and_safetensors_see_a_file_in_pytorch_format(tmp_path):
    entry, _ = save(nn.Linear(2, 2), tmp_path)
    with safe_open(f"{entry}/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tied_parameters_are_stored_once_under_their_first_name(tmp_path):
    module = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    module["head"].weight = module["embed"].weight
    module["again"] = module["embed"]
    entry, stored = save(module, tmp_path)
    assert stored == dict.fromkeys(["embed.weight", "head.weight", "again.weight"], "embed.weight")
    assert load(entry).keys() == {"embed.weight"}


def test_views_expanded_empty_scalar_and_integer_parameters_are_stored(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "column": base[:, 1],
        "expanded": base[:1, :1].expand(2, 5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "codes": torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8).T,
        "mask": torch.tensor([True, False, True]),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    loaded = load(save(Holder(**tensors), tmp_path)[0])
    assert all(torch.equal(loaded[name], tensor.resolve_conj()) for name, tensor in tensors.items())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_NAMES, key=str)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 200),
)
def test_any_mix_of_dtypes_shapes_and_shards_comes_back_as_safetensors_reads_it(tmp_path, specs, shard_bytes):
    tensors = {}
    for number, (dtype, shape) in enumerate(specs):
        count = torch.Size(shape).numel()
        raw = torch.randint(
            0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8
        )
        tensors[f"p{number}"] = raw.view(dtype).reshape(shape)
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zinfer.store.module, "SHARD_BYTES", shard_bytes)
        entry, _ = save(module, tmp_path)
    loaded = load(entry)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert bytes(zinfer.store.safetensors_writer.tensor_bytes(loaded[name])) == bytes(
            zinfer.store.safetensors_writer.tensor_bytes(tensor)
        )
    verify(entry)


def test_shards_are_cut_at_the_limit_and_a_larger_tensor_is_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(zinfer.store.module, "SHARD_BYTES", 100)
    sizes = {"a": 10, "b": 15, "big": 60, "c": 5, "d": 20}
    module = Holder(**{name: torch.ones(size) for name, size in sizes.items()})
    entry, _ = save(module, tmp_path)
    shards = [sorted(load_file(shard)) for shard in open_checkpoint(entry).shards]
    assert shards == [["a", "b"], ["big"], ["c", "d"]]
    assert "model.safetensors.index.json" in os.listdir(entry)


def test_an_identical_module_is_found_again_without_writing(tmp_path, monkeypatch):
    torch.manual_seed(0)
    first, _ = save(nn.Linear(3, 3), tmp_path)
    monkeypatch.setattr(zinfer.store.module, "write_shard", None)
    torch.manual_seed(0)
    assert save(nn.Linear(3, 3), tmp_path)[0] == first


@pytest.mark.parametrize(
    "other",
    [
        Holder(w=torch.tensor([1.0, 3.0])),
        Holder(v=torch.tensor([1.0, 2.0])),
        Holder(w=torch.tensor([[1.0, 2.0]])),
        Holder(w=torch.tensor([1.0, 2.0]).view(torch.int32)),
        Holder(w=torch.tensor([1.0, 2.0]), x=torch.empty(0)),
    ],
    ids=["contents", "name", "shape", "dtype", "another parameter"],
)
def test_a_module_that_differs_gets_its_own_entry(tmp_path, other):
    assert save(Holder(w=torch.tensor([1.0, 2.0])), tmp_path)[0] != save(other, tmp_path)[0]


def test_a_tie_makes_a_difference(tmp_path):
    tied = nn.Parameter(torch.ones(2))
    assert save(Holder(a=tied, b=tied), tmp_path)[0] != save(Holder(a=tied), tmp_path)[0]


class Bytesless(torch.Tensor):
    """A wrapper without storage, like a streamed parameter."""

    @staticmethod
    def __new__(cls):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, (2, 2), dtype=torch.float32, device=torch.device("cpu")
        )
        tensor._is_param = True
        return tensor

    def __init__(self):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("touched")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Parameter(torch.empty(2, device="meta")), "is on the meta device"),
        (Bytesless, "is a Bytesless, a tensor without memory of its own"),
        (lambda: nn.Parameter(torch.eye(2).to_sparse()), "has layout torch.sparse_coo"),
        (lambda: nn.LazyLinear(2).weight, "is not initialized"),
    ],
    ids=["meta", "wrapper", "sparse", "lazy"],
)
def test_a_parameter_without_bytes_is_refused_by_name_before_anything_is_written(tmp_path, make, message):
    module = Holder(fine=torch.ones(2))
    module._parameters["strange"] = make()
    with pytest.raises(OptionError, match=f"parameter 'strange' {message}"):
        save(module, tmp_path)
    assert not (tmp_path / "zinfer-store").exists()


def test_a_parameter_subclass_with_storage_is_stored(tmp_path):
    class Marked(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func is not torch.Tensor.detach, "its bytes are not to be had through its own operators"
            return super().__torch_function__(func, types, args, kwargs or {})

    loaded = load(save(Holder(w=Marked(torch.ones(3))), tmp_path)[0])
    assert torch.equal(loaded["w"], torch.ones(3))


def test_a_dtype_that_safetensors_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(StoreError, match=r"tensor 'w' has dtype torch\.complex128"):
        save(Holder(w=nn.Parameter(torch.ones(2, dtype=torch.complex128))), tmp_path)


def test_a_module_without_parameters_is_refused(tmp_path):
    with pytest.raises(OptionError, match="Identity has no parameters"):
        save(nn.Identity(), tmp_path)


def test_a_module_that_changes_while_it_is_written_leaves_no_entry(tmp_path, monkeypatch):
    module = nn.Linear(3, 3)
    original = zinfer.store.module.write_shard

    def altering(*args):
        with torch.no_grad():
            module.bias.add_(1)
        return original(*args)

    monkeypatch.setattr(zinfer.store.module, "write_shard", altering)
    with pytest.raises(StoreError, match="'bias' changed while it was written"):
        save(module, tmp_path)
    assert files_of(*entries(tmp_path)) == {}


def test_what_was_written_does_not_stay_in_the_page_cache(tmp_path):
    skip_unless_the_cache_can_be_dropped(tmp_path)
    entry, _ = save(nn.Linear(4096, 2048, bias=False), tmp_path)
    assert cached_share(f"{entry}/model.safetensors") < 0.1


def test_ctrl_c_leaves_nothing_and_the_next_call_writes_it(tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zinfer.store.part_file.PartFile, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(nn.Linear(3, 3), tmp_path)
    assert files_of(*entries(tmp_path)) == {}
    verify(save(nn.Linear(3, 3), tmp_path)[0])


def test_no_more_than_one_tensors_copy_is_held_beyond_the_module(tmp_path, start_python):
    """Eight transposed 32-MiB tensors, each to be copied: the peak grows by less than three of them."""
    process = start_python(
        f"""
        import resource, torch
        from zinfer.store import save_module
        from torch import nn
        module = nn.Module()
        for number in range(8):
            parameter = nn.Parameter(torch.ones(1024, 8192).T)
            module.register_parameter(f"p{{number}}", parameter)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        save_module(module, {str(tmp_path)!r}, progress=False)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
        """
    )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(output) < 96, f"{output} MiB more"
