"""Google Cloud Storage: only what is its own. `objects/` does the rest.

store        the store with its threads
source       its files and directories
location     gs:// URIs (pure)
account      addresses, signed headers, versions, and the parsing of lists
credentials  google-auth's part: tokens, or why there are none; imported when first needed
answers      the meaning of error answers (pure)
settings     the flags of GCS alone
"""
