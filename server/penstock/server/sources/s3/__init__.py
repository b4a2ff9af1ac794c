"""S3 and the stores that call themselves compatible with it: only what is their own. `objects/` does the
rest.

store        the store with its threads
source       its files and directories
location     s3:// URIs, and who may read them (pure)
account      credentials, endpoints, signatures, lists: boto3's part, imported when first needed
credentials  why no credentials can be used, in words
answers      the meaning of error answers (pure)
settings     the flags of S3 alone
"""
