"""Real data from installed packages or the user's own files, and pure ways to draw batches from it.

Data is split into training and validation once and for all. In memory, as NumPy arrays, a batch is a pure
function of a key, so it can be drawn inside `jit` and `vmap` and consumed by `lax.scan`. A stream reads each
batch when it is its turn, each process its own rows: from a file larger than memory, or from grain.
"""

from mujax.data._batches import (
    TOKENS as TOKENS,
    batch_indices as batch_indices,
    image_batches as image_batches,
    text_batches as text_batches,
    text_starts as text_starts,
    text_window as text_window,
    text_windows as text_windows,
)
from mujax.data._files import load as load
from mujax.data._packaged import fashion_mnist as fashion_mnist, mnist as mnist, text as text
from mujax.data._splits import (
    MIN_EXAMPLES as MIN_EXAMPLES,
    MIN_TEXT_BYTES as MIN_TEXT_BYTES,
    Data as Data,
    ExampleData as ExampleData,
    Examples as Examples,
    TextData as TextData,
    digest as digest,
)
from mujax.data._streams import (
    Stream as Stream,
    grain_stream as grain_stream,
    image_stream as image_stream,
    is_grain as is_grain,
    text_stream as text_stream,
)
from mujax.data._token_files import token_file as token_file
