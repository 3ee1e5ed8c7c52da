// Reads where the tensors of a cohort are, and whether everything else is as the cohort was made (see the page "Addresses").
// It is called through ctypes with Python objects, holds the GIL, and includes no header of Python or torch: only the functions
// of Python's stable ABI that it declares here, and torch's DLPack exchange table.
#include <cstddef>
#include <cstdint>

typedef struct _object PyObject;
extern "C" {
PyObject* PyObject_GetAttr(PyObject*, PyObject*);
PyObject* PyObject_GetAttrString(PyObject*, const char*);
PyObject* PyObject_CallObject(PyObject*, PyObject*);
PyObject* PyDict_GetItemWithError(PyObject*, PyObject*);
int PyDict_SetItem(PyObject*, PyObject*, PyObject*);
int PyList_SetItem(PyObject*, ptrdiff_t, PyObject*);
PyObject* PyList_GetItem(PyObject*, ptrdiff_t);
PyObject* PyTuple_GetItem(PyObject*, ptrdiff_t);
ptrdiff_t PyList_Size(PyObject*);
ptrdiff_t PyTuple_Size(PyObject*);
ptrdiff_t PyDict_Size(PyObject*);
ptrdiff_t PyLong_AsSsize_t(PyObject*);
int PyObject_RichCompareBool(PyObject*, PyObject*, int);
void PyErr_Clear(void);
void Py_DecRef(PyObject*);
}

// DLPack 1.x: https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h
struct DLTensor {
    void* data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Exchange {
    uint32_t major, minor;
    void *prev, *alloc, *managed_from, *managed_to;
    int (*from)(void*, DLTensor*);
    void* stream;
};

// A random odd factor for each place of a signature.
enum { MOST_AXES = 64 };
static struct Keys {
    uint64_t k[4 + 2*MOST_AXES];
    Keys() {
        for (uint64_t i = 0; i < 4 + 2*MOST_AXES; i++) {
            uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull;
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
            k[i] = (x ^ (x >> 27)) | 1;
        }
    }
} keys;

static PyObject* call(PyObject* o, const char* method) { // a new reference, or null
    PyObject* f = o ? PyObject_GetAttrString(o, method) : nullptr;
    PyObject* r = f ? PyObject_CallObject(f, nullptr) : nullptr;
    if (f) Py_DecRef(f);
    return r;
}

// Has the storage of tensor o been freed? A view then has its offset for an address: small, but not null.
static bool freed(PyObject* o) {
    PyObject* storage = call(o, "untyped_storage");
    PyObject* bytes = call(storage, "nbytes");
    const bool r = !bytes || PyLong_AsSsize_t(bytes) <= 0;
    if (bytes) Py_DecRef(bytes);
    if (storage) Py_DecRef(storage);
    return r;
}

// The address of tensor o, and a signature of all else that a kernel relies on. False if o can't be read or has no memory.
static bool look(const Exchange* api, PyObject* o, int64_t* address, uint64_t* signature) {
    DLTensor t;
    if (api->from(o, &t)) return false;
    *address = int64_t(t.data) + int64_t(t.byte_offset);
    if (t.ndim > MOST_AXES) return false;
    const uint64_t* k = keys.k;
    uint64_t h = t.code*k[0] + t.bits*k[1] + ((uint64_t(uint32_t(t.device_type)) << 32) | uint32_t(t.device_id))*k[2] + t.ndim*k[3];
    for (int i = 0; i < t.ndim; i++) h += t.shape[i]*k[4+2*i] + t.strides[i]*k[5+2*i];
    *signature = h;
    if (uint64_t(*address) >> 32) return true;
    for (int i = 0; i < t.ndim; i++) if (!t.shape[i]) return true; // no elements
    return *address && !freed(o);
}

static ptrdiff_t differs(ptrdiff_t i) { PyErr_Clear(); return i; }

// Read parameter, gradient and state tensors of each row into `address`. With `record`, also write their signatures; without, compare
// them, the addresses of parameters (`home`), and the numbers in the state. Returns -1 if all is as it was, else the first other row.
extern "C" int64_t look_all(const Exchange* api, PyObject* params, PyObject* states, PyObject* names, PyObject* number_keys,
                            PyObject* numbers, PyObject* grad, PyObject* none, PyObject* grads,
                            int64_t* address, uint64_t* signature, const int64_t* home, int record) {
    const ptrdiff_t n = PyList_Size(params), nt = PyTuple_Size(names), nk = PyTuple_Size(number_keys), ncol = nt + 2;
    for (ptrdiff_t i = 0; i < n; i++) {
        int64_t* a = address + i*ncol;
        uint64_t* s = signature + i*ncol;
        const auto same = [=](PyObject* o, ptrdiff_t c) {
            uint64_t h;
            if (!look(api, o, a + c, &h)) return false;
            if (record) s[c] = h;
            return s[c] == h;
        };
        PyObject *p = PyList_GetItem(params, i), *state = PyList_GetItem(states, i);
        if (!same(p, 0)) return differs(i);
        if (!record && a[0] != home[i]) return i; // it has moved, and may share memory now
        PyObject* g = PyObject_GetAttr(p, grad);
        if (!g || PyList_SetItem(grads, i, g)) return differs(i); // the list owns g: no other thread can free it before the kernel has run
        if (g == none || !same(g, 1)) return differs(i);
        if (PyDict_Size(state) != nt + nk) return i;
        for (ptrdiff_t c = 0; c < nt; c++) {
            PyObject* t = PyDict_GetItemWithError(state, PyTuple_GetItem(names, c));
            if (!t || !same(t, c + 2)) return differs(i);
        }
        for (ptrdiff_t c = 0; c < nk; c++) {
            PyObject *v = PyDict_GetItemWithError(state, PyTuple_GetItem(number_keys, c)), *w = PyTuple_GetItem(numbers, c);
            if (!v) return differs(i);
            if (v == w) continue;
            const int equal = PyObject_RichCompareBool(v, w, 2);
            if (equal <= 0) return differs(i);
        }
    }
    return -1;
}

// Write these entries into all of these dicts.
extern "C" int set_all(PyObject* dicts, PyObject* entry_keys, PyObject* values) {
    const ptrdiff_t n = PyList_Size(dicts), nk = PyTuple_Size(entry_keys);
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t c = 0; c < nk; c++)
            if (PyDict_SetItem(PyList_GetItem(dicts, i), PyTuple_GetItem(entry_keys, c), PyTuple_GetItem(values, c))) return -1;
    return 0;
}
