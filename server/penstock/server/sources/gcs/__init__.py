"""What is Google Cloud Storage's own; `objects/` does the rest.

store        all of it with its threads
source       what lies in it
location     gs:// URIs (pure)
account      addresses, signed headers, versions, and what lists say
credentials  google-auth's part: tokens, and why there are none; imported when first needed
answers      what error answers mean (pure)
settings     what only GCS has flags for
"""
