"""The wire: teacher.proto, its generated stubs (`make protos`) and the array codec of `arrays.py`."""
