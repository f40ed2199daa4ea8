"A GPU that is not there: tensors that hold their numbers on the processor and say that they lie on a GPU; what mixes both raises, as on a GPU"
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves,tree_map

gpu = torch.device('cuda:0')
may_mix = 'aten._to_copy.default','aten.copy_.default','aten.index.Tensor','aten.index_put.default','aten.index_put_.default'

class FarTensor(torch.Tensor):
    "`near` is where the numbers are"
    __torch_function__ = torch._C._disabled_torch_function_impl
    @staticmethod
    def __new__(cls, near):
        self = torch.Tensor._make_wrapper_subclass(cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device='cpu')
        self.near = near
        return self
    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None): return call(f, args, kwargs or {})
    device,is_cuda = property(lambda self: gpu),property(lambda self: True)
    def as_subclass(self, cls): return self
    def cpu(self): return self.detach().near.clone()
    def to(self, *args, **kwargs):
        args = [*args, *(v for k,v in kwargs.items() if k in ('device','dtype'))]
        like = next((o for o in args if isinstance(o, torch.Tensor)), None)
        if like is not None: args = [like.device, like.dtype]
        dtype,dev = next((o for o in args if isinstance(o, torch.dtype)), self.dtype),next((torch.device(o) for o in args if isinstance(o, (str,torch.device))), gpu)
        res = self if dtype==self.dtype else self.type(dtype)
        return res.cpu() if dev.type=='cpu' else res
    def numpy(self): raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
    __array__ = numpy
    def tolist(self): return self.near.tolist()
    def __format__(self, spec): return format(self.near, spec)
    def __repr__(self): return f'FarTensor({self.near})'

def call(f, args, kwargs):
    "Run `f` on the numbers"
    ts,name = [o for o in tree_leaves((args,kwargs)) if isinstance(o, torch.Tensor)],str(f)
    far,near = ([o for o in ts if isinstance(o, FarTensor)==b] for b in (True,False))
    if far and any(o.ndim for o in near) and name not in may_mix: raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {tuple(far[0].shape)} on {gpu} and {tuple(near[0].shape)} on cpu")
    dev = kwargs.get('device')
    far_result = bool(far) if dev is None or (far and name=='aten._to_copy.default') else torch.device(dev).type=='cuda' # a copy within the device says 'cpu', see `_make_wrapper_subclass`
    if dev is not None: kwargs = {**kwargs, 'device':torch.device('cpu')}
    if name=='aten.copy_.default':
        (args[0].near if isinstance(args[0], FarTensor) else args[0]).copy_(args[1].near if isinstance(args[1], FarTensor) else args[1])
        return args[0]
    out = f(*(tree_map(lambda o: o.near if isinstance(o, FarTensor) else o, o) for o in args), **tree_map(lambda o: o.near if isinstance(o, FarTensor) else o, kwargs))
    was = {id(o.near):o for o in far}
    return tree_map(lambda o: (was.get(id(o)) if id(o) in was else FarTensor(o)) if isinstance(o, torch.Tensor) else o, out) if far_result else out

class StandIn(TorchDispatchMode):
    "Inside, what is made on 'cuda' is made there"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None): return call(f, args, kwargs or {})

def there(t): return FarTensor(t.detach().clone())

def move(o, new, there=there):
    "Put the tensors that `o` holds onto the other device; `new` remembers what has been moved"
    if isinstance(o, torch.nn.Parameter): return new.setdefault(o, torch.nn.Parameter(there(o), o.requires_grad))
    if isinstance(o, torch.Tensor): return there(o)
    if isinstance(o, tuple): return tuple(move(v, new, there) for v in o)
    if isinstance(o, dict): o.update({k: move(v, new, there) for k,v in o.items()})
    elif isinstance(o, list): o[:] = [move(v, new, there) for v in o]
    elif type(o).__module__.startswith('cfext') and id(o) not in new:
        new[id(o)] = o
        held = {k: move(v, new, there) for k,v in vars(o).items() if k not in ('learn','gen','_seeds','classes')}
        o.__dict__.update(held)
    return o

def move_learner(learn, there=there):
    "Put a learner's model, callbacks and rows there; returns what became of the parameters"
    new = {}
    for m in learn.model.modules():
        for d in (m._parameters,m._buffers): d.update({k: move(v, new, there) for k,v in d.items()})
        vars(m).update({k: there(v) for k,v in vars(m).items() if isinstance(v, torch.Tensor)})
    for cb in learn.cbs: move(cb, new, there)
    for dl in learn.dls.loaders:
        if dl.resident: move(dl.dataset, new, there)
        dl.device = gpu
    learn.dls.device = gpu
    return new
