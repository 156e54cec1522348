"""Models of transformers with PEER layers: their blocks, files, training and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import peer

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers.modeling_utils import PreTrainedModel  # noqa: E402

VERSION = int(transformers.__version__.partition(".")[0])

SIZES = {"num_experts": (6, 5), "heads": 2, "num_experts_per_head": 3, "dim_key": 4}
CONFIG = peer.PEERConfig(**SIZES, query_norm="rms")

# The names are those of different generations of models, and keywords of other generations differ.
DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: DECODER[key] for key in list(DECODER)[:5]} | {"max_position_embeddings": 64}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
MIXTURE = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {"vocab_size": 50, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
OPT |= {"num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}

# Class, options of its configuration, names of its blocks ("" if they depend on the version), and
# how a table describes a block.
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "transformer.h.{}.mlp", "GPT2MLP"),
    "llama": ("LlamaForCausalLM", DECODER, "model.layers.{}.mlp", "LlamaMLP"),
    "qwen3": ("Qwen3ForCausalLM", DECODER, "model.layers.{}.mlp", "Qwen3MLP"),
    "gemma3": ("Gemma3ForCausalLM", DECODER, "model.layers.{}.mlp", "Gemma3MLP"),
    "mixtral": ("MixtralForCausalLM", MIXTURE, "", "MixtralSparseMoeBlock: 4 experts, 2 per token"),
    "bert": (
        "BertForMaskedLM",
        ENCODER,
        "bert.encoder.layer.{}.intermediate",
        "BertLayer: intermediate, output.dense",
    ),
    "opt": ("OPTForCausalLM", OPT, "model.decoder.layers.{}.fc1", "OPTDecoderLayer: fc1, fc2"),
}


def make_model(name: str, **options: Any) -> PreTrainedModel:
    kind = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    return kind(kind.config_class(**MODELS[name][1], **options)).eval()


def replace(model: PreTrainedModel, config: peer.PEERConfig = CONFIG, **options: Any):
    """Replaces the blocks of the first and the last of three layers."""
    return peer.replace_ffn_(model, config, lambda module, name: ".1." not in name, **options)


def perturb(model: PreTrainedModel) -> PreTrainedModel:
    """Gives all parameters other values than any initialisation gives them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save_and_load(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    if VERSION < 5:
        peer.hf.update_config(model)
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def peers(model: torch.nn.Module) -> list[peer.PEER]:
    return [part for part in model.modules() if isinstance(part, peer.PEER)]


class TestBlocks:
    def test_the_blocks_of_a_model_are_found(self, name: str):
        model = make_model(name)
        table = peer.replace_ffn_(model, CONFIG, dry_run=True)
        pattern, before = MODELS[name][2:]
        assert [entry.before for entry in table] == [before] * 3
        if pattern:
            assert table.names == [pattern.format(layer) for layer in range(3)]

    def test_a_layer_gives_what_its_router_and_pool_give(self, name: str, ids: torch.Tensor):
        model = make_model(name)
        replace(model)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in peers(model):
            layer.register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
        dense = make_model(name)(ids).logits
        assert not torch.equal(model(ids).logits, dense)
        assert len(seen) == 2
        assert all(x.shape[-1] == 16 and x.shape == out.shape for x, out in seen)

    def test_beside_a_block_outputs_do_not_change_by_a_bit(self, name: str, ids: torch.Tensor):
        model = make_model(name)
        expected = model(ids).logits
        replace(model, mode="beside")
        assert torch.equal(model(ids).logits, expected)

    def test_a_model_on_meta_stays_there(self, name: str):
        with torch.device("meta"):
            model = make_model(name)
        replace(model)
        assert all(parameter.is_meta for parameter in model.parameters())

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_model_trains(self, name: str, checkpointing: bool, ids: torch.Tensor):
        model = make_model(name).train()
        replace(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        for layer in peers(model):
            assert all(parameter.grad is not None for parameter in layer.parameters())
            assert layer.experts.weight.grad.count_nonzero() > 0

    def test_offloaded_blocks_are_refused(self):
        model = accelerate.cpu_offload(make_model("bert"), torch.device("cpu"))
        with pytest.raises(
            ValueError, match=r"weights of '.*\.intermediate' in memory, but accelerat"
        ):
            peer.replace_ffn_(model, CONFIG)
        assert not peers(model)

    def test_parts_of_a_model_and_quantized_models_are_refused(self):
        model = make_model("llama")
        with pytest.raises(
            ValueError, match=r"expected the whole model of transformers, .*filter_fn"
        ):
            peer.replace_ffn_(model.model.layers, CONFIG)
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
        with pytest.raises(ValueError, match="not quantized, got one quantized by 'bitsandbytes'"):
            peer.replace_ffn_(model, CONFIG)
        assert not peers(model)


class TestFiles:
    @pytest.mark.parametrize("mode", ["replace", "beside"])
    def test_a_saved_model_loads_to_the_bit(
        self, name: str, mode: str, ids: torch.Tensor, tmp_path: Path
    ):
        model = make_model(name)
        replace(model, mode=mode)
        perturb(model)
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert len(peers(loaded)) == 2

    def test_the_configuration_travels_in_config_json(self, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert saved["quant_method"] == "peer"
        assert list(saved["layers"]) == ["model.layers.0.mlp", "model.layers.2.mlp"]
        options = saved["layers"]["model.layers.0.mlp"]["options"]
        assert (options["num_experts"], options["query_norm"]) == ([6, 5], "rms")

    def test_shards(self, ids: torch.Tensor, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        loaded = save_and_load(model, tmp_path, max_shard_size="8KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        "options",
        [
            {"low_cpu_mem_usage": True},
            {"device_map": "cpu"},
            {"device_map": "auto"},
            {"dtype": torch.bfloat16},
            {"dtype": "auto"},
        ],
        ids=str,
    )
    def test_options_of_loading(self, options: dict[str, Any], ids: torch.Tensor, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        model.save_pretrained(tmp_path)
        if "dtype" in options and VERSION < 5:
            options = {"torch_dtype": options["dtype"]}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        half = torch.bfloat16 in options.values()
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16 if half else torch.float32}
        expected = (model.to(torch.bfloat16) if half else model)(ids).logits
        assert torch.equal(loaded(ids).logits, expected)

    def test_a_model_in_16_bits(self, ids: torch.Tensor, tmp_path: Path):
        model = make_model("llama").to(torch.bfloat16)
        replace(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model.save_pretrained(tmp_path)
        key = "dtype" if VERSION >= 5 else "torch_dtype"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{key: "auto"})
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_other_heads_load_the_layers(self, ids: torch.Tensor, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        model.save_pretrained(tmp_path / "head")
        base = transformers.LlamaModel.from_pretrained(tmp_path / "head")
        expected = model.model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(again.model(ids).last_hidden_state, expected)
        classifier = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "head")
        assert torch.equal(classifier.model(ids).last_hidden_state, expected)

    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_a_shared_pool_is_saved_once_and_stays_shared(
        self, name: str, ids: torch.Tensor, tmp_path: Path
    ):
        model = make_model(name)
        replace(model, peer.PEERConfig(**SIZES, query_norm="rms", share_experts=True))
        perturb(model)
        peers(model)[1].freeze_experts([3, 4])
        loaded = save_and_load(model, tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert sum(key.endswith("experts.weight") for key in file.keys()) == 1  # noqa: SIM118
        first, last = peers(loaded)
        assert first.experts is last.experts
        assert first.experts.frozen.nonzero().flatten().tolist() == [3, 4]
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_growth_masks_and_statistics_are_in_the_files(
        self, name: str, ids: torch.Tensor, tmp_path: Path
    ):
        model = make_model(name)
        replace(model, peer.PEERConfig(**SIZES))
        model.train()(ids)  # moves the running statistics
        first, last = peers(model)
        first.grow(2)
        first.freeze_experts([1, 7], router=True)
        last.disable_experts([2])
        model.eval()
        loaded = save_and_load(model, tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        again, other = peers(loaded)
        assert again.num_experts == 40
        assert torch.equal(again.router.norm.running_mean, first.router.norm.running_mean)
        assert torch.equal(again.experts.frozen, first.experts.frozen)
        assert not again.router.query.weight.requires_grad
        assert torch.equal(other.experts.disabled, last.experts.disabled)

    def test_folded_queries_load(self, ids: torch.Tensor, tmp_path: Path):
        model = make_model("llama")
        replace(model, peer.PEERConfig(**SIZES))
        peer.fold_query_norm_(model)
        assert torch.equal(save_and_load(model, tmp_path)(ids).logits, model(ids).logits)

    def test_loaded_tables_lie_on_huge_pages(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        from peer.hf import quantizer

        tables = []

        def note(*size: int, **options: Any) -> torch.Tensor:
            tables.append(peer.empty_huge(*size, **options))
            return tables[-1]

        model = make_model("llama")
        replace(model)
        model.save_pretrained(tmp_path)
        monkeypatch.setattr(quantizer, "empty_huge", note)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert len(tables) == 2
        for layer, table in zip(peers(loaded), tables, strict=True):
            assert layer.experts.weight.data_ptr() == table.data_ptr()
            assert layer.experts.weight.requires_grad

    def test_a_loaded_model_is_not_marked_as_quantized(self, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        loaded = save_and_load(model, tmp_path / "first")
        assert not getattr(loaded, "is_quantized", False)
        assert not hasattr(loaded, "hf_quantizer")
        assert not hasattr(loaded.config, "_is_quantized")  # Flash Attention asks for it
        assert loaded.half().dtype == torch.float16
        assert loaded.float().dtype == torch.float32
        loaded.save_pretrained(tmp_path / "second")
        first, second = (
            json.loads((tmp_path / folder / "config.json").read_text())
            for folder in ("first", "second")
        )
        assert first == second

    def test_a_second_replacement_is_recorded_too(self, ids: torch.Tensor, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        model = save_and_load(model, tmp_path / "first")
        peer.replace_ffn_(model, CONFIG, mode="beside")
        perturb(model)
        loaded = save_and_load(model, tmp_path / "second")
        assert len(peers(loaded)) == 3
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    @pytest.mark.skipif(VERSION >= 5, reason="goes by the files")
    def test_a_configuration_that_is_out_of_date_is_an_error(self, tmp_path: Path):
        for change in (lambda x: x.grow(1), lambda x: x.disable_experts(2), peer.fold_query_norm_):
            model = make_model("llama")
            replace(model, peer.PEERConfig(**SIZES))
            change(peers(model)[0])
            model.save_pretrained(tmp_path)
            with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|update_config"):
                type(model).from_pretrained(tmp_path)

    def test_files_without_a_layer_are_an_error(self, tmp_path: Path):
        model = make_model("llama")
        model.save_pretrained(tmp_path)
        replace(model)
        model.config.save_pretrained(tmp_path)
        message = r"PEER layer at 'model\.layers\.0\.mlp', but the files lack its router"
        if VERSION < 5:
            message = "the files lack|size mismatch"
        with pytest.raises((RuntimeError, ValueError), match=message):
            type(model).from_pretrained(tmp_path)

    def test_replacing_while_loading_is_an_error(self, tmp_path: Path):
        from peer.hf.quantizer import PEERLayersConfig

        make_model("llama").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"call peer\.replace_ffn_ after loading"):
            transformers.LlamaForCausalLM.from_pretrained(
                tmp_path, quantization_config=PEERLayersConfig({})
            )


LOAD = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import torch
ids = torch.arange(3, 12)[None]
print(float(model(ids).logits.detach().double().square().sum()))
"""

LOAD_WITHOUT_PEER = """
import sys, transformers
half = len(sys.argv) // 2
for folder, kind in zip(sys.argv[1 : half + 1], sys.argv[half + 1 :]):
    try:
        getattr(transformers, kind).from_pretrained(folder)
        print("loaded", folder)
    except Exception as error:
        print(type(error).__name__)
assert not any(name.partition(".")[0] == "peer" for name in sys.modules)
"""


def run(program: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Runs a program. Its directory is first on its path, so it has no source tree of peer."""
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


class TestNewProcesses:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[Path, float]:
        model = make_model("llama")
        replace(model)
        model.save_pretrained(tmp_path)
        logits = model(torch.arange(3, 12)[None]).logits.detach()
        return tmp_path, float(logits.double().square().sum())

    @pytest.mark.parametrize(
        "imports",
        [
            "import transformers\nimport peer",
            "import transformers.quantizers.auto\nimport peer",
        ],
    )
    def test_importing_peer_is_enough(self, imports: str, saved: tuple[Path, float]):
        result = run(LOAD.format(imports=imports), saved[0])
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) == pytest.approx(saved[1], rel=1e-5)

    def test_without_peer_loading_is_an_error(self, tmp_path: Path):
        folders = {}
        for name in MODELS:
            for mode in ("replace", "beside"):
                model = make_model(name)
                replace(model, mode=mode)
                folder = tmp_path / f"{name}-{mode}"
                model.save_pretrained(folder)
                folders[folder] = type(model).__name__
        result = run(LOAD_WITHOUT_PEER, *folders, *folders.values())
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == ["RuntimeError"] * len(folders), result.stderr

    def test_importing_peer_does_not_import_transformers(self):
        result = run("import sys, peer; print([m for m in sys.modules if 'transformers' in m])")
        assert result.stdout.strip() == "['peer._transformers']", result.stderr

    def test_the_finder_removes_itself(self):
        result = run(
            "import sys, peer, transformers.quantizers.auto as auto, peer._transformers as ours\n"
            "print(any(isinstance(f, ours._Finder) for f in sys.meta_path), auto.__loader__,"
            " 'peer' in auto.AUTO_QUANTIZER_MAPPING)"
        )
        assert result.stdout.startswith("False <_frozen_importlib_external.SourceFileLoader")
        assert result.stdout.endswith("True\n"), result.stderr


class TestTraining:
    @pytest.fixture
    def train(self, tmp_path: Path) -> Callable[[PreTrainedModel], Any]:
        def train(model: PreTrainedModel) -> Any:
            data = [
                {"input_ids": row, "labels": row}
                for row in torch.randint(3, 50, (16, 9), generator=torch.Generator().manual_seed(0))
            ]
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=4,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                report_to=[],
                save_steps=2,
                use_cpu=True,
                seed=0,
            )
            return transformers.Trainer(model=model, args=arguments, train_dataset=data)

        return train

    def test_trainer_trains_a_loaded_model_and_resumes(self, train, ids, tmp_path: Path):
        model = make_model("llama")
        replace(model)
        loaded = save_and_load(model, tmp_path / "saved")
        trainer = train(loaded)
        trainer.train()
        assert not torch.equal(loaded(ids).logits, model(ids).logits)
        for layer, old in zip(peers(loaded), peers(model), strict=True):
            assert not torch.equal(layer.experts.weight, old.experts.weight)
        checkpoint = type(model).from_pretrained(tmp_path / "run" / "checkpoint-4")
        assert torch.equal(checkpoint(ids).logits, loaded.eval()(ids).logits)
        resumed = save_and_load(model, tmp_path / "saved")
        train(resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        torch.testing.assert_close(resumed.eval()(ids).logits, loaded(ids).logits)

    def test_generation_with_a_cache_equals_generation_without(self, ids: torch.Tensor):
        model = make_model("llama")
        replace(model)
        options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
        with_cache = model.generate(ids, **options)
        assert with_cache.shape == (2, 17)
        assert torch.equal(model.generate(ids, use_cache=False, **options), with_cache)

    @pytest.mark.parametrize("query_norm", ["rms", "layer", None])
    def test_padding_does_not_reach_other_tokens(self, query_norm: str | None, ids: torch.Tensor):
        model = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        replace(model, peer.PEERConfig(**SIZES, query_norm=query_norm))
        model.train()
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        other = torch.where(mask.bool(), ids, ids.roll(1, 1))
        kept = mask.bool()
        out, again = (model(x, attention_mask=mask).logits[kept] for x in (ids, other))
        torch.testing.assert_close(out, again)
