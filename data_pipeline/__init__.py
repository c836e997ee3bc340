"""From files to batches: shards, index, order, reading, decoding, transforms, and the loader that joins them.

Ground floor: imports nothing of ours outside itself. Importers and the scene world are modules of their own
(`data_pipeline.importers`, `data_pipeline.scenes`), so that reading data does not load them; so is sound
(`data_pipeline.sound`), which loads scipy.
"""

from data_pipeline.batch import Batch, BatchMaker, Corrupt, Share
from data_pipeline.block_order import BlockOrder
from data_pipeline.buckets import BucketOrder, bucket_sizes
from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.index import Index, ShardEntry, build_index, load_index
from data_pipeline.joined import Joined
from data_pipeline.loader import Loader, sequential_batches
from data_pipeline.mixture import Mixture, Phase
from data_pipeline.order import Order, ReadingOrder
from data_pipeline.reader import Dataset, open_dataset, read_order
from data_pipeline.remote import Cache
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import Written, write_shards
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import ImageTransform, QuestionTransform, TextTransform, sample_generator

__all__ = [
    "Batch",
    "BatchMaker",
    "BlockOrder",
    "BucketOrder",
    "Cache",
    "Corrupt",
    "DataError",
    "Dataset",
    "ImageTransform",
    "Index",
    "Joined",
    "Loader",
    "Mixture",
    "Order",
    "Phase",
    "QuestionTransform",
    "ReadingOrder",
    "Sample",
    "ShardEntry",
    "Share",
    "Skipped",
    "TextTransform",
    "Tokenizer",
    "Written",
    "bucket_sizes",
    "build_index",
    "decode_image",
    "load_index",
    "open_dataset",
    "read_order",
    "sample_generator",
    "sequential_batches",
    "write_shards",
]
