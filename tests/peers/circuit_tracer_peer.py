"""A script that runs circuit-tracer on transcoder sets; it runs in its environment, so without saebench.

Its arguments are a task and a folder. ``encode``: load the set in ``FOLDER/set`` and, with the rows of each
layer in ``FOLDER/rows.npy`` [layers, n, d], write ``FOLDER/codes.npy`` and ``FOLDER/output.npy``. ``make``:
first write a set with random weights and decoder norms other than 1; a third argument has its settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import torch
import yaml

# circuit-tracer 0.5 imports this name, which huggingface-hub 1 no longer has.
huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet  # noqa: E402
from circuit_tracer.transcoder.activation_functions import JumpReLU  # noqa: E402
from circuit_tracer.utils.hf_utils import load_transcoders  # noqa: E402


@torch.no_grad()
def encode(folder: Path) -> None:
    config = yaml.safe_load((folder / "set" / "config.yaml").read_text())
    n_layers = len(list((folder / "set").glob("layer_*.safetensors")))
    # Without this list, the files are downloaded from the repository of the set.
    config["transcoders"] = [str(folder / "set" / f"layer_{layer}.safetensors") for layer in range(n_layers)]
    x_LND = torch.from_numpy(np.load(folder / "rows.npy"))
    for lazily in (False, True):
        loaded = load_transcoders(config, torch.device("cpu"), lazy_encoder=lazily, lazy_decoder=lazily)
        codes_LNM = loaded.encode(x_LND)
        output_LND = loaded.decode(codes_LNM, x_LND)
        parts = loaded.compute_attribution_components(x_LND, zero_positions=slice(0, 0))
        torch.testing.assert_close(parts["reconstruction"], output_LND, rtol=1e-4, atol=1e-4)
    np.save(folder / "codes.npy", codes_LNM.numpy())
    np.save(folder / "output.npy", output_LND.numpy())
    hooks = {name: getattr(loaded, name) for name in ("feature_input_hook", "feature_output_hook", "scan")}
    (folder / "loaded.json").write_text(json.dumps({**hooks, "skip": loaded.skip_connection}))


def make(folder: Path, *, n_layers: int, d_model: int, d_sae: int, jumprelu: bool, skip: bool) -> None:
    torch.manual_seed(1)
    transcoders = {}
    for layer in range(n_layers):
        activation = JumpReLU(torch.rand(d_sae), 0.1) if jumprelu else torch.nn.functional.relu
        made = SingleLayerTranscoder(
            d_model, d_sae, activation, layer, skip, device=torch.device("cpu"), dtype=torch.float32
        )
        for name, parameter in made.named_parameters():
            if "threshold" not in name:
                torch.nn.init.normal_(parameter)
        transcoders[layer] = made
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    TranscoderSet(transcoders, **hooks, scan="theirs").to_safetensors(str(folder / "set"))
    config = {"model_name": "demo", "model_kind": "transcoder_set", **hooks, "scan": "theirs"}
    (folder / "set" / "config.yaml").write_text(yaml.safe_dump(config))


if __name__ == "__main__":
    task, where = sys.argv[1], Path(sys.argv[2])
    if task == "make":
        make(where, **json.loads(sys.argv[3]))
    encode(where)
