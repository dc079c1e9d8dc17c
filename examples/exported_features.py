"""Features out of an exported encoder, with timm alone: Smalti need not be installed where the model is used.

    smalti export runs/a to=timm --out exported
    python examples/exported_features.py exported features.npz a.jpg b.jpg

The file holds, for each image, one vector (``image``) and one vector per patch in raster order (``patches``).
"""

import argparse

import numpy as np
import timm
import torch
from PIL import Image


@torch.inference_mode()
def main() -> None:
    """Load, prepare, encode, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", help="the folder that smalti export wrote")
    parser.add_argument("out", help="an .npz file")
    parser.add_argument("images", nargs="+")
    options = parser.parse_args()

    model = timm.create_model(f"local-dir:{options.exported}", pretrained=True).eval()
    # size, mean and standard deviation of the training come with the model
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in options.images])

    tokens = model.forward_features(batch)  # (B, prefix tokens + patches, D)
    vectors = model.forward_head(tokens, pre_logits=True)  # (B, D)
    patches = tokens[:, model.num_prefix_tokens :]  # (B, N, D)
    np.savez(options.out, image=vectors.numpy(), patches=patches.numpy())
    print(f"{options.out}: image {tuple(vectors.shape)}, patches {tuple(patches.shape)}")


if __name__ == "__main__":
    main()
