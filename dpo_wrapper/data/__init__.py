"""Preference data: rows -> one normal form -> tokens -> dataset -> batches."""

from .dataset import PreferenceCollator as PreferenceCollator
from .dataset import PreferenceDataset as PreferenceDataset
from .dataset import PreferenceItem as PreferenceItem
from .dataset import PreferenceItemWithColumns as PreferenceItemWithColumns
from .encode import EncodedRows as EncodedRows
from .encode import TokenPair as TokenPair
from .encode import encode_row as encode_row
from .encode import encode_rows as encode_rows
from .files import read_rows as read_rows
from .files import split_rows as split_rows
from .listed import ListedRow as ListedRow
from .listed import TokenList as TokenList
from .listed import encode_listed as encode_listed
from .listed import normalize_listed as normalize_listed
from .listed import read_listed as read_listed
from .rows import Fields as Fields
from .rows import Message as Message
from .rows import Row as Row
from .rows import RowError as RowError
from .rows import normalize as normalize
from .tokenizers import ByteTokenizer as ByteTokenizer
from .tokenizers import HuggingFaceTokenizer as HuggingFaceTokenizer
from .tokenizers import Tokenizer as Tokenizer
from .tokenizers import load_tokenizer as load_tokenizer
