"""What is S3's own, and that of stores that call themselves compatible; `objects/` does the rest.

store        all of it with its threads
source       what lies in it
location     s3:// URIs, and who may read them (pure)
account      credentials, endpoints, signatures, what lists say: boto3's part, imported when first needed
credentials  why there are none that can be used, in words
answers      what error answers mean (pure)
settings     what only S3 has flags for
"""
