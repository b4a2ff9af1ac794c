"""Files on plain web servers, `https://` and `http://`; `objects/` does the rest.

store     the store with its threads
source    its files; web servers have no lists
location  URLs, and who may read them (pure)
service   where requests go, through redirects, and what names a version
answers   the meaning of error answers (pure)
logins    users and passwords from a netrc file
"""
