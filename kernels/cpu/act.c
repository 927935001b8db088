/* One call from Python in the usual case, with the interpreter kept out of it: numpy arrays of the right shapes, or a
 * float for the reward, in, actions out. Anything else is answered with None, for Python to sort out.
 *
 * It is built where Python's headers are; without it ctypes does the same, a few microseconds slower. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "drl_policy.h"

typedef int64_t (*step_function)(const drl_policy *, int64_t, const int64_t *, const float *, const float *,
                                 const uint8_t *, const float *, float *, float *, int);

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    step_function step;
    const drl_policy *policy;
    float *observations, *rewards, *state, *actions;
    Py_ssize_t rows, channels;
    int threads, busy; /* busy is changed with the interpreter's lock held */
    PyObject *result;  /* called for the actions to give away */
    PyObject *refuse;  /* called with what `step` returned instead of 0, raises */
    PyObject *owner;   /* keeps the memory and the policy */
} Caller;

/* Copies a buffer of float or double, (rows, channels) or, where channels is 0, (rows,), into place; 0 if it is another. */
static int copied(PyObject *numbers, float *to, Py_ssize_t rows, Py_ssize_t channels) {
    Py_buffer view;
    if (PyObject_GetBuffer(numbers, &view, PyBUF_STRIDES | PyBUF_FORMAT) < 0) return PyErr_Clear(), 0;
    const char kind = view.format && !view.format[1] ? view.format[0] : 0;
    const int fits = view.ndim == (channels ? 2 : 1) && view.shape[0] == rows &&
                     (!channels || view.shape[1] == channels) && (kind == 'f' || kind == 'd');
    if (fits) {
        const Py_ssize_t columns = channels ? channels : 1, stride = channels ? view.strides[1] : 0;
        for (Py_ssize_t row = 0; row < rows; ++row) {
            const char *from = (const char *)view.buf + row * view.strides[0];
            for (Py_ssize_t i = 0; i < columns; ++i, from += stride)
                *to++ = kind == 'f' ? *(const float *)from : (float)*(const double *)from;
        }
    }
    PyBuffer_Release(&view);
    return fits;
}

static PyObject *refuse(void) {
    PyErr_SetString(PyExc_RuntimeError,
                    "two threads act on one remembered state; let each call policy.step with a state of its own");
    return NULL;
}

static PyObject *act(PyObject *object, PyObject *const *arguments, size_t count, PyObject *names) {
    Caller *self = (Caller *)object;
    if (PyVectorcall_NARGS(count) != 2 || names) {
        PyErr_SetString(PyExc_TypeError, "takes observations and rewards");
        return NULL;
    }
    if (self->busy) return refuse();
    if (PyFloat_CheckExact(arguments[1])) {
        const float reward = (float)PyFloat_AS_DOUBLE(arguments[1]);
        for (Py_ssize_t row = 0; row < self->rows; ++row) self->rewards[row] = reward;
    } else if (!copied(arguments[1], self->rewards, self->rows, 0)) Py_RETURN_NONE;
    if (!copied(arguments[0], self->observations, self->rows, self->channels)) Py_RETURN_NONE;
    int64_t bad;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    bad = self->step(self->policy, self->rows, NULL, self->observations, self->rewards, NULL, self->state, self->state,
                     self->actions, self->threads);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    if (bad) return PyObject_CallFunction(self->refuse, "L", (long long)bad);
    return PyObject_CallNoArgs(self->result);
}

/* A lock's two methods, for whoever does the same by another way; nobody waits for it. */
static PyObject *acquire(PyObject *object, PyObject *blocking) {
    if (blocking != Py_False) return PyErr_SetString(PyExc_ValueError, "acquire(False) is all there is"), NULL;
    Caller *self = (Caller *)object;
    if (self->busy) Py_RETURN_FALSE;
    self->busy = 1;
    Py_RETURN_TRUE;
}

static PyObject *release(PyObject *object, PyObject *ignored) {
    (void)ignored;
    ((Caller *)object)->busy = 0;
    Py_RETURN_NONE;
}

static PyObject *make(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    unsigned long long step, policy, observations, rewards, state, actions;
    Py_ssize_t rows, channels;
    int threads;
    PyObject *result, *refuse, *owner;
    if (names && PyDict_GET_SIZE(names)) return PyErr_SetString(PyExc_TypeError, "takes no names"), NULL;
    if (!PyArg_ParseTuple(arguments, "KKKKKKnniOOO", &step, &policy, &observations, &rewards, &state, &actions, &rows,
                          &channels, &threads, &result, &refuse, &owner))
        return NULL;
    Caller *self = (Caller *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->call = act;
    self->step = (step_function)(uintptr_t)step;
    self->policy = (const drl_policy *)(uintptr_t)policy;
    self->observations = (float *)(uintptr_t)observations, self->rewards = (float *)(uintptr_t)rewards;
    self->state = (float *)(uintptr_t)state, self->actions = (float *)(uintptr_t)actions;
    self->rows = rows, self->channels = channels, self->threads = threads;
    self->result = Py_NewRef(result), self->refuse = Py_NewRef(refuse), self->owner = Py_NewRef(owner);
    return (PyObject *)self;
}

static void forget(PyObject *self) {
    Py_XDECREF(((Caller *)self)->result);
    Py_XDECREF(((Caller *)self)->refuse);
    Py_XDECREF(((Caller *)self)->owner);
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef methods[] = {{"acquire", acquire, METH_O, "Whether nobody was acting; now the caller is."},
                                {"release", release, METH_NOARGS, "The end of what acquire began."},
                                {NULL, NULL, 0, NULL}};

static PyTypeObject caller = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "drl.kernels.cpu._act.Caller",
    .tp_doc = "Steps over memory whose addresses it is given.",
    .tp_basicsize = sizeof(Caller),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Caller, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = make,
    .tp_dealloc = forget,
    .tp_methods = methods,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_act", .m_size = -1};

PyMODINIT_FUNC PyInit__act(void) {
    PyObject *made = PyType_Ready(&caller) < 0 ? NULL : PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Caller", (PyObject *)&caller) < 0) Py_CLEAR(made);
    return made;
}
