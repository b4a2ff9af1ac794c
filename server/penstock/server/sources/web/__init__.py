"""Files on plain web servers, `https://` and `http://`; `objects/` does the rest.

store     all of it with its threads
source    what lies there: files, and no lists of them
location  URLs, and who may read them (pure)
service   where requests go, through redirects, and what names a version
answers   what error answers mean (pure)
logins    users and passwords, out of a netrc file
"""
