/* The passes of autopar/intraop/sweep.py over its flat program, in C; and reduce.py's min-plus.

   The same formulas with the same order of sums, so that both give the same bits: built without
   contraction of a * b + c and for the baseline of the machine's architecture (native.py). Minima
   have no order.

   strategies   of all nodes one after the other; a node's are [first, first + size)
   arcs         one per edge and end; a node's are [later, later + num_later) and [earlier, ...)
   work         room for two vectors of work_size, the size of the largest node
   Addresses are those of numpy's arrays.  */

#include <math.h>
#include <stdint.h>

typedef struct {
    int64_t first, size, later, num_later, earlier, num_earlier;
} Node;

typedef struct {
    int64_t there;        /* number of the other node */
    double *message;      /* msg[here->there], in strategies of there */
    const double *reply;  /* msg[there->here] */
    const double *matrix; /* R [n_here, n_there], finite */
    const double *back;   /* its transpose */
    const double *exact;  /* as given: inf where forbidden */
} Arc;

_Static_assert(sizeof(void *) == sizeof(int64_t), "an Arc is six int64 in compiled.py");

static void copy(int64_t n, const double *from, double *to) {
    for (int64_t s = 0; s < n; s++) to[s] = from[s];
}

static void add(int64_t n, const double *restrict more, double *restrict to) {
    for (int64_t s = 0; s < n; s++) to[s] += more[s];
}

/* out[t] = min over s of matrix[s, t] + ( a[s] - b[s] ) */
static void min_rows(int64_t rows, int64_t columns, const double *restrict matrix,
                     const double *restrict a, const double *restrict b, double *restrict out) {
    for (int64_t t = 0; t < columns; t++) out[t] = INFINITY;
    for (int64_t s = 0; s < rows; s++, matrix += columns) {
        const double more = a[s] - b[s];
        for (int64_t t = 0; t < columns; t++) {
            const double x = matrix[t] + more;
            out[t] = x < out[t] ? x : out[t];
        }
    }
}

/* out[t] = min over s of matrix[s, t] - a[s] */
static void min_rows_less(int64_t rows, int64_t columns, const double *restrict matrix,
                          const double *restrict a, double *restrict out) {
    for (int64_t t = 0; t < columns; t++) out[t] = INFINITY;
    for (int64_t s = 0; s < rows; s++, matrix += columns) {
        for (int64_t t = 0; t < columns; t++) {
            const double x = matrix[t] - a[s];
            out[t] = x < out[t] ? x : out[t];
        }
    }
}

/* out [n_u, n_w] = min over v of left[v, u] + right[v, w] */
void min_plus(int64_t n_v, int64_t n_u, int64_t n_w, const double *left,
              const double *restrict right, double *restrict out) {
    for (int64_t u = 0; u < n_u; u++, out += n_w) {
        for (int64_t w = 0; w < n_w; w++) out[w] = INFINITY;
        for (int64_t v = 0; v < n_v; v++) {
            const double more = left[v * n_u + u];
            const double *row = right + v * n_w;
            for (int64_t w = 0; w < n_w; w++) {
                const double x = more + row[w];
                out[w] = x < out[w] ? x : out[w];
            }
        }
    }
}

/* The first of the least. */
static int64_t argmin(int64_t n, const double *values) {
    int64_t best = 0;
    for (int64_t s = 1; s < n; s++)
        if (values[s] < values[best]) best = s;
    return best;
}

/* g_v = 1 / max(1, #later, #earlier) */
static double share(const Node *v) {
    const int64_t most = v->num_later > v->num_earlier ? v->num_later : v->num_earlier;
    return 1.0 / (double)(most > 1 ? most : 1);
}

/* c_v + sum_w msg[w->v] */
static void belief_of(const Node *v, const Arc *arcs, const double *unary, double *belief) {
    copy(v->size, unary + v->first, belief);
    for (int64_t i = v->earlier; i < v->earlier + v->num_earlier; i++)
        add(v->size, arcs[i].reply, belief);
    for (int64_t i = v->later; i < v->later + v->num_later; i++)
        add(v->size, arcs[i].reply, belief);
}

/* msg[v->w] = min over x_v of ( shared - msg[w->v] + R_vw ) for each of these arcs */
static void send(const Node *nodes, const Node *v, const Arc *arc, int64_t num_arcs,
                 const double *shared) {
    for (const Arc *end = arc + num_arcs; arc < end; arc++)
        min_rows(v->size, nodes[arc->there].size, arc->matrix, shared, arc->reply, arc->message);
}

/* Returns the bound; position[v]: of the greedy assignment. */
double forward(int64_t num_nodes, const Node *nodes, const Arc *arcs, const double *unary,
               double *work, int64_t work_size, int64_t *position) {
    double bound = 0.0, *belief = work, *local = work + work_size;
    for (int64_t number = 0; number < num_nodes; number++) {
        const Node *v = nodes + number;
        const double g_v = share(v);
        copy(v->size, unary + v->first, local);
        for (int64_t i = v->earlier; i < v->earlier + v->num_earlier; i++) {
            const int64_t columns = nodes[arcs[i].there].size;
            const double *column = arcs[i].matrix + position[arcs[i].there];
            for (int64_t s = 0; s < v->size; s++) local[s] += column[s * columns];
        }
        for (int64_t i = v->later; i < v->later + v->num_later; i++)
            add(v->size, arcs[i].reply, local);
        position[number] = argmin(v->size, local);
        belief_of(v, arcs, unary, belief);
        bound += (1.0 - g_v * (double)v->num_later) * belief[argmin(v->size, belief)];
        for (int64_t s = 0; s < v->size; s++) belief[s] *= g_v;
        send(nodes, v, arcs + v->later, v->num_later, belief);
    }
    return bound;
}

void backward(int64_t num_nodes, const Node *nodes, const Arc *arcs, const double *unary,
              double *work, int64_t work_size) {
    (void)work_size;
    for (int64_t number = num_nodes - 1; number >= 0; number--) {
        const Node *v = nodes + number;
        if (!v->num_earlier) continue;
        belief_of(v, arcs, unary, work);
        const double g_v = share(v);
        for (int64_t s = 0; s < v->size; s++) work[s] *= g_v;
        send(nodes, v, arcs + v->earlier, v->num_earlier, work);
    }
}

/* out[strategies] = belief(v) of every node */
void beliefs(int64_t num_nodes, const Node *nodes, const Arc *arcs, const double *unary,
             double *out) {
    for (const Node *v = nodes; v < nodes + num_nodes; v++)
        belief_of(v, arcs, unary, out + v->first);
}

/* out[strategies] = slack_v(s); right after `forward` */
void slack(int64_t num_nodes, const Node *nodes, const Arc *arcs, const double *unary,
           double *work, int64_t work_size, double *out) {
    double *belief = work, *pair = work + work_size;
    for (const Node *v = nodes; v < nodes + num_nodes; v++, out += v[-1].size) {
        const double g_v = share(v), own = 1.0 - g_v * (double)v->num_later;
        belief_of(v, arcs, unary, belief);
        const double least = belief[argmin(v->size, belief)];
        for (int64_t s = 0; s < v->size; s++) out[s] = own * (belief[s] - least);
        for (const Arc *arc = arcs + v->later; arc < arcs + v->later + v->num_later; arc++) {
            const double *reply = arc->reply;
            min_rows_less(nodes[arc->there].size, v->size, arc->back, arc->message, pair);
            for (int64_t s = 0; s < v->size; s++) {
                const double x = pair[s] + g_v * belief[s] - reply[s];
                out[s] += x > 0.0 ? x : 0.0;
            }
        }
    }
}

/* What an assignment costs: nodes, then edges by their earlier end; inf where forbidden. */
double cost(int64_t num_nodes, const Node *nodes, const Arc *arcs, const double *unary,
            const int64_t *position) {
    double total = 0.0;
    for (int64_t v = 0; v < num_nodes; v++) total += unary[nodes[v].first + position[v]];
    for (int64_t v = 0; v < num_nodes; v++)
        for (int64_t i = nodes[v].later; i < nodes[v].later + nodes[v].num_later; i++) {
            const int64_t columns = nodes[arcs[i].there].size;
            total += arcs[i].exact[position[v] * columns + position[arcs[i].there]];
        }
    return total;
}
