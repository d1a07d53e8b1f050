"""Image-text pairs on disk: reading what a user has, writing shards, indexing them, and loading batches."""

from contrastive.shards.augment import Augment, augment_pixels
from contrastive.shards.batch import Batch, Rejection
from contrastive.shards.cache import open_cache
from contrastive.shards.compiled import compile_pixels, why_not_compiled
from contrastive.shards.decode import decode_image, resize_square
from contrastive.shards.features import FeatureLoader
from contrastive.shards.filters import Filters, Transform
from contrastive.shards.in_memory import write_shards
from contrastive.shards.index import ShardIndex, caption_id, open_index
from contrastive.shards.loader import PairLoader
from contrastive.shards.making import make_shards
from contrastive.shards.mixture import Mixture
from contrastive.shards.pools import on_processes, on_ray
from contrastive.shards.record import Record, Rejected, Source, image_extension
from contrastive.shards.sources import open_source
from contrastive.shards.tokens import TokenCache
from contrastive.shards.write import Manifest

__all__ = [
    "Augment",
    "Batch",
    "FeatureLoader",
    "Filters",
    "Manifest",
    "Mixture",
    "PairLoader",
    "Record",
    "Rejected",
    "Rejection",
    "ShardIndex",
    "Source",
    "TokenCache",
    "Transform",
    "augment_pixels",
    "caption_id",
    "compile_pixels",
    "decode_image",
    "image_extension",
    "make_shards",
    "on_processes",
    "on_ray",
    "open_cache",
    "open_index",
    "open_source",
    "resize_square",
    "why_not_compiled",
    "write_shards",
]
