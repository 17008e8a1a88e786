from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Average(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AVERAGE_UNSPECIFIED: _ClassVar[Average]
    LOGITS: _ClassVar[Average]
    PROBABILITIES: _ClassVar[Average]
AVERAGE_UNSPECIFIED: Average
LOGITS: Average
PROBABILITIES: Average

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DTYPE_UNSPECIFIED: _ClassVar[Array.DType]
        UINT8: _ClassVar[Array.DType]
        INT32: _ClassVar[Array.DType]
        INT64: _ClassVar[Array.DType]
        FLOAT16: _ClassVar[Array.DType]
        FLOAT32: _ClassVar[Array.DType]
    DTYPE_UNSPECIFIED: Array.DType
    UINT8: Array.DType
    INT32: Array.DType
    INT64: Array.DType
    FLOAT16: Array.DType
    FLOAT32: Array.DType
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: Array.DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[Array.DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Rendering(_message.Message):
    __slots__ = ("size", "interpolation", "antialias", "version", "decoder")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    ANTIALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    size: int
    interpolation: str
    antialias: bool
    version: str
    decoder: str
    def __init__(self, size: _Optional[int] = ..., interpolation: _Optional[str] = ..., antialias: _Optional[bool] = ..., version: _Optional[str] = ..., decoder: _Optional[str] = ...) -> None: ...

class DataSet(_message.Message):
    __slots__ = ("name", "digest", "num_samples")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    num_samples: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., num_samples: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("fingerprint", "model", "num_classes", "precision", "rendering", "max_rows", "data_sets", "weights_digest", "renders", "batch_invariant")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    RENDERING_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    DATA_SETS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RENDERS_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    model: str
    num_classes: int
    precision: str
    rendering: Rendering
    max_rows: int
    data_sets: _containers.RepeatedCompositeFieldContainer[DataSet]
    weights_digest: str
    renders: bool
    batch_invariant: bool
    def __init__(self, fingerprint: _Optional[str] = ..., model: _Optional[str] = ..., num_classes: _Optional[int] = ..., precision: _Optional[str] = ..., rendering: _Optional[_Union[Rendering, _Mapping]] = ..., max_rows: _Optional[int] = ..., data_sets: _Optional[_Iterable[_Union[DataSet, _Mapping]]] = ..., weights_digest: _Optional[str] = ..., renders: _Optional[bool] = ..., batch_invariant: _Optional[bool] = ...) -> None: ...

class References(_message.Message):
    __slots__ = ("digest", "sample")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    sample: Array
    def __init__(self, digest: _Optional[str] = ..., sample: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class EncodedImages(_message.Message):
    __slots__ = ("image", "sample")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    image: _containers.RepeatedScalarFieldContainer[bytes]
    sample: Array
    def __init__(self, image: _Optional[_Iterable[bytes]] = ..., sample: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class Views(_message.Message):
    __slots__ = ("image", "box", "flip")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    FLIP_FIELD_NUMBER: _ClassVar[int]
    image: Array
    box: Array
    flip: Array
    def __init__(self, image: _Optional[_Union[Array, _Mapping]] = ..., box: _Optional[_Union[Array, _Mapping]] = ..., flip: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("request_id", "fingerprint", "references", "encoded", "pixels", "views", "partner", "lam", "mean_of", "average", "audit", "audit_pixels", "client")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    PARTNER_FIELD_NUMBER: _ClassVar[int]
    LAM_FIELD_NUMBER: _ClassVar[int]
    MEAN_OF_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    AUDIT_PIXELS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    references: References
    encoded: EncodedImages
    pixels: Array
    views: Views
    partner: Array
    lam: Array
    mean_of: int
    average: Average
    audit: Array
    audit_pixels: bool
    client: str
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., references: _Optional[_Union[References, _Mapping]] = ..., encoded: _Optional[_Union[EncodedImages, _Mapping]] = ..., pixels: _Optional[_Union[Array, _Mapping]] = ..., views: _Optional[_Union[Views, _Mapping]] = ..., partner: _Optional[_Union[Array, _Mapping]] = ..., lam: _Optional[_Union[Array, _Mapping]] = ..., mean_of: _Optional[int] = ..., average: _Optional[_Union[Average, str]] = ..., audit: _Optional[_Union[Array, _Mapping]] = ..., audit_pixels: _Optional[bool] = ..., client: _Optional[str] = ...) -> None: ...

class PredictReply(_message.Message):
    __slots__ = ("request_id", "fingerprint", "logits", "audit_digest", "audit_pixels")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AUDIT_PIXELS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    logits: Array
    audit_digest: Array
    audit_pixels: Array
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., logits: _Optional[_Union[Array, _Mapping]] = ..., audit_digest: _Optional[_Union[Array, _Mapping]] = ..., audit_pixels: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...
