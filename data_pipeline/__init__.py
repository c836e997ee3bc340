"""From files to batches: shards, index, order, reading, decoding, transforms, and the loader that joins them.

Ground floor: imports nothing of ours outside itself. Importers and the scene world are modules of their own
(`data_pipeline.importers`, `data_pipeline.scenes`), so that reading data does not load them.
"""

from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.index import Index, ShardEntry, build_index, load_index
from data_pipeline.loader import Batch, BatchMaker, Corrupt, Loader, sequential_batches
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset, read_order
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import Written, write_shards
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import ImageTransform, TextTransform, sample_generator

__all__ = [
    "Batch",
    "BatchMaker",
    "Corrupt",
    "DataError",
    "Dataset",
    "ImageTransform",
    "Index",
    "Loader",
    "Order",
    "Sample",
    "ShardEntry",
    "Skipped",
    "TextTransform",
    "Tokenizer",
    "Written",
    "build_index",
    "decode_image",
    "load_index",
    "open_dataset",
    "read_order",
    "sample_generator",
    "sequential_batches",
    "write_shards",
]
