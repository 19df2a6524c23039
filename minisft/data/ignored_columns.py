"""A note on the columns of a data set that nothing reads.

if note := ignored_columns(source, records, ranking=False):
    print(note)
"""

from minisft.data.dataset_info import FILE_NAME
from minisft.data.formats import PREFERENCE_COLUMNS
from minisft.data.records import Records
from minisft.data.row_values import BadRow, without_nulls
from minisft.data.sources import Source

NUM_ROWS = 100  # to look at
# Columns that published data sets use for a part of the prompt -> its name in dataset_info.json.
PROMPT_COLUMNS = {"system_prompt": "system", "context": "query"}


def ignored_columns(source: Source, records: Records, ranking: bool | None) -> str:
    """The note on the first rows of a file; empty if all their columns are read.

    ranking: as in open_rows.
    """
    columns = set()
    for number in range(min(NUM_ROWS, len(records))):
        try:
            record = records[number]
        except BadRow:
            continue
        columns |= without_nulls(record).keys() if isinstance(record, dict) else set()
    hint = "train.py --stage rm and dpo learn from chosen and rejected"
    has_preferences = columns >= PREFERENCE_COLUMNS and ranking is False
    ignored = source.description.ignored(columns) if source.description else []
    if ignored:
        return (
            f"{source.name}: {records.path} has {', '.join(ignored)}. {FILE_NAME} does not "
            f"name them, so they are ignored{f'; {hint}' if has_preferences else ''}"
        )
    unread = {} if source.description else PROMPT_COLUMNS
    for column in sorted(unread.keys() & columns):
        return (
            f"{records.path} has {column}, which is ignored. {FILE_NAME} can name it, as "
            f'"columns": {{"{unread[column]}": "{column}", ...}}'
        )
    if has_preferences:
        return f"{records.path}: only the single answer of each row is read; {hint}"
    return ""
